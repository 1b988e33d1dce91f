"""From what a user writes to what the models read: prompts, chats, image masks, labels, batches."""
