"""The application: training, evaluation, export and the demo, behind the command ``sst-fast``. Its dependencies are extras."""
