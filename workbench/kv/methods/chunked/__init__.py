"""Methods that read the prompt chunk by chunk in bounded memory."""
