"""The work of each command, without click: a library user can call the same functions."""
