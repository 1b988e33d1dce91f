"""Images from the web, fetched within limits: which addresses, how many bytes, how long."""
