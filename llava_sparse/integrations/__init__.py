"""llava_sparse inside other programs; nothing of theirs is imported before it is used."""
