"""What one worker alone takes for its work, over sizes: the curves that a plan of a cluster begins with."""
