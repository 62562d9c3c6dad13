"""What times: the cases, who is measured, the clocks, processes of their own, and the report."""
