"""From a request to tokens and text."""
