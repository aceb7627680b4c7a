"""Setup that commands share: inputs of a run, the model built for training, the merged model, held-out rows."""
