"""What makes plain layers fast on a CPU: oneDNN, recomputing what is cheaper to make than to keep, and int8."""
