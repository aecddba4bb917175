"""Data: from public sets to the four training mixes, streaming, resumable, accounted for.

    qwen-merge data convert LLaVA_ReCap_558K        one set, or several
    qwen-merge data sets                            their names and where they come from

A set is a folder of parquet shards in the record format (`schema`), named in `data/dataset_info.json`, with a manifest
beside it (`manifest`) that says where every row went (`counts`). Nothing here decodes a picture to keep it: its bytes
are copied as they are, decoded once to see that they can be, and thrown away decoded. A folder that exists under a
set's name is complete; what is under way lies in a hidden folder beside it (`workspace`).
"""
