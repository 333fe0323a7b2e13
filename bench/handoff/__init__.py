"""What a handoff costs: its bandwidth beside that of the bare transfer engine, and what a request notices of it."""
