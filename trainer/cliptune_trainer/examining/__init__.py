"""`cliptune eval`: a model measured over data, at one image size or over several, without a job."""
