"""Token ids -> vectors -> residual update. Plain torch; never imports transformers."""
