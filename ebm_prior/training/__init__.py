"""The trainings: pretraining a backbone, fitting a prior to it, joint training of both."""
