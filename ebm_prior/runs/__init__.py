"""What each command does, without click: a library user can call the same functions."""
