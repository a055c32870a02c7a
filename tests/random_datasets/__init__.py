"""Random datasets: a clean one in any layout, and the defects that people bring."""
