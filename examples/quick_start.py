import normtune

model = normtune.load("nano")  # in the package; or a directory, or a name of the hub
data = normtune.open_dataset("phantom-b:80/0/20")  # drawn; or ("slake", root="SLAKE"), or "rows.jsonl"
frozen = normtune.evaluate(model, data)
run = normtune.train(model, data, tune="ln", epochs=4, out="runs/quick")  # trains 0.3% of the values
tuned = normtune.evaluate(model, data, adapter=run.adapter)
print(normtune.compare({"frozen": frozen, "ln": tuned}))
image, question = data.open_image(data.test[0].images[0]), data.test[0].question
print(question, normtune.ask(model, image, question, adapter=run.adapter))
