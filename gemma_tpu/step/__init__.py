"""One update as a pure function: loss, optimizer, and the shape of the job."""
