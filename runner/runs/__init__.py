"""Looking at runs from outside: reads what their processes wrote, changes nothing, needs no torch."""
