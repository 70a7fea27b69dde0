"""Speech to text: the engines, each imported only when chosen."""
