from stand_in import bootstrap

bootstrap()
