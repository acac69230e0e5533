"""What this machine can do, and what we reach of it: measured by hand, imported by no other room."""
