"""Models written for one device, with tables that say how they start, where they may be split and what Hugging Face calls them."""
