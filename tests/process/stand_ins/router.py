from stand_in import router

router()
