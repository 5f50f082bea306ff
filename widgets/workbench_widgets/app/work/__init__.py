"""One tab's work off the event loop, and the models that tabs share."""
