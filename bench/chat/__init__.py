"""A conversation, turn by turn: what the second and the tenth turn cost when all before them is known already."""
