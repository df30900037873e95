"""Model classes and pruning methods: every file here may travel to a Hub repository on its own."""
