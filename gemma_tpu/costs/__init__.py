"""Hours, tokens and prices into dollars; which accelerator suits."""
