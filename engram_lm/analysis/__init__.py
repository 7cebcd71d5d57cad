"""Questions about a trained model, and the reports that show the answers."""
