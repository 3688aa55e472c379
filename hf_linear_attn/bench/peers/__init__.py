"""Other people's attention, called as ours is."""
