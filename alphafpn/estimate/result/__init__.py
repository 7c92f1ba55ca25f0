"""The estimate: factors, the counts they come from, report and picture."""
