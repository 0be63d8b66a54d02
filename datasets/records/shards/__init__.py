"""WebDataset shards: tar files in which the files of a sample follow one another.

    000000.tar      000000000.json, 000000000.0.jpg, 000000001.json, ...
    000000.parquet  where each file lies, its header and the length of its text

    rows = plait.datasets.open("shards/")          # by number: nothing is unpacked
    for sample in plait.datasets.stream("shards/") # in order, from a pipe or an address too

Files of one sample share what stands before the first dot of their name, as in the `webdataset`
package; what stands behind it says what the file is.

- `.json`: a row of any dialect. Its media are names of files of the sample ("0.jpg"); where it
  names none, all media of the sample are meant.
- `.txt`: a caption, where there is no such row; `.cls` its class.
- whatever ends as pictures, sounds and films do: a medium. Other files are not read, and counted.

`archive` finds the files, `members` says what they mean, `index` keeps where they lie, `table` and
`stream` read them, and `write` makes shards of any records.
"""
