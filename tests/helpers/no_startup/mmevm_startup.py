"""Replace mmevm's own module of this name, so that a test can start Python without importing mmevm with mmengine."""
