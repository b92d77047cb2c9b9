"""The known cohorts: each module finds the cases of one in the layout it is handed out in."""
