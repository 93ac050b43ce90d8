"""The method: the rule table (parameterization), base hyperparameters (hparams), and their transfer. No torch."""
