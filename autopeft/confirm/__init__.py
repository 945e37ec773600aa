"""What makes a claim a claim: finalists, intervals, the verdict."""
