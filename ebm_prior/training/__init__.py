"""The trainings: fitting a prior (second stage), pretraining a backbone, joint training of both."""
