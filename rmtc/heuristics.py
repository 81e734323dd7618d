"""The heuristic limits of rmtc in one place, each with the measurement behind it, or marked as a policy or a guess.

Nothing here decides what a call computes: limits decide what is tried, what is kept, and which of several right ways
runs. Limits of texts that are read from outside are in :mod:`rmtc.ir.limits`.
"""

from __future__ import annotations

# Which way to run a call is chosen (runtime/choice.py)

CHOICE_SETTLED = 6
"""Number of calls of one size after which the first other way has been tried.

A policy: three calls of the way that runs, of which only the third is warm, then three of the other way.
"""

CHOICE_NEAR = 2.0
"""A way is tried if it is expected to take at most this factor of the time of the way that runs.

Estimates were within a third of what was measured, so a way that is expected to take twice as long is hardly faster.
"""

CHOICE_SHARE = 0.1
"""Share of the time of all calls that tries may cost, beside the budget of a capture. A policy: a tenth at most."""

CHOICE_CLEARLY = 0.95
"""Another way replaces the one that runs if it takes less than this share of its time.

A policy: each change of the way changes results by rounding, and a few percent are noise on a machine that does little
else.
"""

CHOICE_HOPELESS = 3.0
"""A try ends early if one call takes more than this factor of the time of the way that runs.

It is expected to take ``CHOICE_NEAR`` times as long at most, and estimates were within a third of what was measured.
"""

CHOICE_AGAIN = 4
"""The number of calls before the next try of another way grows by this factor from try to try.

So a thousand calls of one size have four tries. Of 30 texts that are read again and again they make the third pass a
quarter slower than the second (`benchmarks/lengths.py`).
"""

CHOICE_RECENT = 3
"""The time of a way is the fastest of its last calls, this many. A policy: noise makes calls slower, never faster."""

CHOICE_FIRST_TIMED, CHOICE_TIMED_EVERY = 8, 64
"""The first calls on a GPU are timed, this many, and of later ones one in so many.

To be timed, a call is waited for. Waiting keeps the next call's launches from being queued beside the work of this one.
Not measured on a GPU yet.
"""

CHOICE_FAILURES = 3
"""A way that failed this many times is not tried again. A policy: each failure costs a call as written besides."""

CHOICE_IDLE = 24
"""A try is put off if none of this many calls could be timed, as where threads overlap. A policy."""

CHOICE_OF_CAPTURE = 4
"""A trace of another length, with its replays, takes about the time of the capture divided by this.

Measured: 0.5 of 2.4 s at 8 layers of width 64, 0.7 of 3.7 s at 16 (`benchmarks/limits.py captures`).
"""

ADMITTED_AT_ONCE = 3
"""A size is admitted at once if this many of its calls make up for it, as long as admissions owe no more than a budget.

Texts of five segments and more are (30 texts of 30 lengths; 8 layers, width 128, 32 + 4 positions). When admissions had
to be paid for from time already saved, 13 texts were admitted in the first pass, which took 1.08 times the time of the
code as written, and the last in the fourth. With this 26 or 27 were, in 0.98 to 1.06 times the time; since a size is
predicted only between known ones, which takes a third more replays, 23 to 26 are, in 1.5 to 1.9 times the time, and
0.8 to 0.3 times in the second pass (`benchmarks/lengths.py`).
"""

TRACED_AT_ONCE = 24
"""A size that takes a whole trace is admitted at once if this many calls make up for it.

A text of 10 segments makes up for it in 16 calls (each saves 0.05 s of the trace's 0.8 s), and the trace serves other
last lengths, too. A text of two segments would in 40 calls, and the trace serves such texts alone.
"""

LENGTHS_APART = 2
"""Captures for one length of a last segment of operations of its own; calls of more such lengths run as written.

A policy: where each length has a path of its own, captures would use up `recompile_limit`.
"""

CHOICE_SIZES_KEPT = 1024
"""Number of sizes per size class whose calls are counted. A policy: a count is a few numbers."""

INTERPOLATED = 8
"""Number of segments from which on calls are estimated by those of 8, 16, 32 and 64: to plan each size takes long."""

ESTIMATES_KEPT = 256
"""Number of estimates of a way that are kept. A policy: an estimate takes some hundredths of a second."""

SCHEDULE_MARGIN = 0.9
"""A schedule runs if its estimate is below this share of the estimate of the code as written.

A policy: the code as written changes no result by rounding, and estimates for small models are off by up to 1.7.

Forward and backward, estimates without gradients of 0.26, 0.56, 0.9, 1.0 were 2.6, 1.9, 1.2, 1.2 times as fast.
"""

CHOSEN = 2**18
"""Most elements for which cells of first and of later segments share a group, where gradients are asked for.

In such a group each cell chooses between two values. Shared groups were 6 % faster at 8 layers of width 64, and 10 %
slower at 4 layers with a batch of 32 (memories of 192 x 64).
"""

KEPT_FREELY = 128 * 2**20
"""Bytes that a call keeps for its backward pass before cells run again there. A policy: to run again costs time."""

DERIVED_AFTER = 100
"""Groups that a body trains by autograd before it is written down, in half a second. A guess: some training steps."""

DERIVED_BYTES = 2**23
"""Most bytes of weights of a cell that is written down. A step gained 5 % at 4 MB, and nothing at 67 MB, after 9 s."""

INDUCTOR_MARGIN = 0.75
"""Inductor runs if its estimate is below this share of the estimate of torch, for it compiles first.

With its compiled bodies ARMT took 0.5 to 1.0 times the time of torch's on one machine and 1.0 to 1.1 on another
(docs/benchmarks.md), and to compile takes seconds: a small gain by estimate is none.
"""

INDUCTOR_CALLS = 40
"""Fitted cost of a call of a body that Inductor compiled, in operations of a body that it did not compile."""

SIZE_CLASSES_KEPT = 64
"""Number of size classes of calls whose times are kept: powers of two of batch and segments, so 8 of either."""

INDUCTOR_SECONDS = 20.0
"""Seconds that Inductor takes to compile the bodies of a loop, roughly: 8 and 23 in docs/benchmarks.md."""

REFUSALS_KEPT = 16
"""Number of refused calls whose reasons are kept, or of things that refused calls found where they write. A policy."""

# Several texts are read at once (runtime/pack.py)

LANES = 8
"""The most lanes that are chosen.

16 texts of 4 to 16 segments were read 1.35, 1.53, 1.63, 1.35 and 1.18 times as fast as one by one in 1, 4, 8, 12 and 16
lanes at 8 layers of width 64 with 16 + 4 positions, and 1.45, 1.55, 1.63, 1.33 and 1.19 times at 16 layers.
"""

LANES_BYTES = 1 << 25
"""Most bytes that an operation of all lanes of a CPU is to read and write.

The third-level cache has as many. Sums and products of elements took 1.5 to 2 times as long per byte beyond it: at 16
layers of width 256, 64 + 8 positions, where a lane takes 14 MB, texts were read 0.99, 1.04, 1.00 and 1.01 times as fast
as one by one in 1, 2, 3 and 8 lanes.
"""

PLANNING = 80e-6
"""Seconds that it takes to lay out and check a cell of a run of several texts, once for texts of some sizes.

16 texts of 163 segments in all took 0.1 s at 8 layers.
"""

SETTLING_CALLS = 4
"""Number of calls after which it is looked whether what they leave is known not to matter to the next one.

A policy: an eager call and a run may leave different things, and few models leave a third.
"""

PACKED = 64
"""Number of texts that are read at once, at most: their results and the plan of the run are held.

The ramp between one such run and the next is L - 1 steps, of some hundreds.
"""
PACKED_SEGMENTS = 1024
"""Number of segments with which a run of several texts is full. Results of all of them are held until it ends.

A policy: 64 texts of 16 segments. A segment's results are often its logits.
"""
PACKED_LEAST = 16
"""Number of texts that a run takes at least, if there are as many, whatever their length. Each lane needs several.

A policy: 2 texts for each of 8 lanes.
"""

# A call runs by its plan (passes/launches/plan_launches.py, runtime/arena.py, chain.py)

BLOCK_POSITIONS, BLOCK_CELLS = 512, 2
"""Cells of one layer run at once until they have this many positions, but this many cells at least.

From 512 positions on, larger products are no faster and fall out of the cache: measured for Transformer-XL of width 64
to 512, on the CPU.
"""

TAPES_KEPT, TAPE_BATCHES = 64, 2
"""Number of plans whose steps in the arena are kept, and of their batch sizes: plans of one batch size share memory.

What a size leaves takes 0.1 MB with its plan, its steps and its checks, for 8 layers and 16 to 32 segments
(`benchmarks/limits.py kept`).
"""

ARENAS_FREE = 2
"""Number of arenas of ended streams that are kept for new ones. A policy: an arena holds what a call computes in."""

DESCRIPTIONS_KEPT = 256
"""Number of sizes for which it is kept what a call hands on to the next. A policy: a description is a few names."""

# Constants of the cost model are measured (runtime/measure.py, turns.py)

COST_LAUNCH, COST_OPERAND, COST_OUTSIDE, COST_CALL = 1.8, 2.0, 6.0, 220.0
"""Fitted to calls of the examples, in calls of ATen, which are measured.

An operation of a group takes 1.8, for operands and results are reshaped. To find an operand of a group takes 2, to run
an operation outside of the segments 6, and all else that a call does 220.
"""

COST_SPREAD = 1.25
"""Factor by which the work of a group takes longer, as it leaves caches. Fitted to calls of the examples."""

COST_TRIES, COST_FEW_TRIES = 24, 4
"""Number of times that each constant is measured, and in a short check whether kept ones still hold.

All of it takes some hundredths of a second.
"""

COST_SCATTERED = 1.25
"""The largest scatter of a measurement that is trusted. On an idle machine it is below 1.1."""

COST_OFF = 1.5
"""Kept constants are measured anew if a short measurement differs from one of them by this factor."""

COST_WARM_RUNS = 3
"""Number of runs before those that are measured."""

TURNS_MOST_SPREAD = 1.5
"""Limit on the time of a way's slowest turn, in times of its fastest.

Measured: turns differ by a quarter on a machine that does little else, and a second process on the same cores doubles
some of them.
"""

TURNS_FEWEST = 3
"""Least number of turns that show a spread. A policy: of two, none is the median."""

TURNS_NOISE = 1.05
"""A way that seems this many times as fast as its floor, the products alone, was not measured well.

A little more than 1: operands that a run has just computed lie in a cache, those of the products alone may not.
"""

# A call is tried again, or looked at again (runtime/compiled.py)

FAILED_RUNS = 3
"""A run that failed for some sizes is tried this many times in all. A policy: a signal may have ended it."""

MEMORY_CALLS = 63
"""Limit on the calls of a size that run as written between two that are tried, where runs use up memory.

A policy: a run that always does costs 2 % of the time of such calls then.
"""

FAILED_CAPTURES = 2
"""A capture that an error inside rmtc ended is tried this many times in all. A policy: a capture takes seconds."""

SHORT_CALLS_PER_LOOK = 8
"""One of this many short calls that run as written looks whether the model has changed.

A look costs the guards, 0.3 ms at 8 layers, of a short call's 5 ms: so it is below 1 % of them.
"""

DECISION_ROUNDS = 8
"""Number of times that a decision is made anew because another thread changed the model meanwhile. A policy."""

SINGLE_SEGMENT_PROBES = 32
"""Number of argument structures that may turn out to be of one segment before no more are probed.

A policy: each takes a run of a call several times as long, under fakes.
"""

PLANS_KEPT = 64
"""Number of different calls whose plans are kept: 0.1 MB each, see ``TAPES_KEPT``."""

KERNELS_KEPT = 512
"""Number of emitted bodies that are kept, each for one size.

A last segment of another length adds those of prologue, layer and epilogue, 0.2 MB with its plan at 8 layers
(`benchmarks/limits.py kept`).
"""

# A call is captured (capture/, analysis.py)

PROBE_USES = 3
"""A short probing run ends when each tensor used so far was used this many times.

A policy: some segments have passed by then.
"""

PROBE_OPERATIONS = 40_000
"""Every probing run ends after this many operations.

A call as written of 16 layers and 16 segments has 41,000; it takes 0.1 s, and seconds under fakes
(`benchmarks/limits.py captures`).
"""

PROBE_FACTORS = (2, 8, 64, 1024)
"""A call of less than two segments is probed at these multiples of its length.

The last is for a call of one token where segments have up to 1,024.
"""

KEYS_LEARNED = 16
"""Number of times that a capture learns which attributes a call adds to its modules.

A guess: some classes of layers, each of which adds attributes at a few lines. A dictionary that gets a key per segment
comes to this number.
"""

REPLAY_MANY = 3
"""Two more short replays are made in place of a long one if that is this many times as long as a short one.

A policy: the short ones then decide for all longer calls, too, and take two thirds of its time.
"""

SHORT_RUN = 3
"""Number of segments of the shorter run that is folded.

The fewest that have a segment behind two first ones, as later ones are.
"""

MEMORY_AGES = (2, 3)
"""Ages in segments of values that memories may read: where short runs do not repeat, longer ones are traced.

A policy: for each age a run of three times as many segments and two more is traced, which takes time by its length.
"""

OLDEST_MEMORY = 16
"""Age in segments of the oldest values for which longer runs are traced, where runs show that such values are read.

A policy: layers that write their memories into each other's outputs read what is as many segments old as there are
layers, and a run of one and a half times as many segments is traced.
"""

PROBE_BATCHES = (2, 5)
"""Batch sizes of the two folded runs, in no ratio to the numbers of segments. Code may treat a batch of 1 apart."""

NEAREST_BATCHES = 6
"""A size is looked for between known sizes of so many batch sizes, the nearest ones.

With two last lengths of each, 793 choices of up to four sizes are tried, which takes 67 ms.
"""

WHOLE_TRACE = 20_000
"""Most operations of a call that is traced whole because a replay cannot decide.

A policy: a capture of 8 layers, whose traces have 12 segments or 15,000 operations as written, takes 2.4 s in all.
"""

CACHE_ENTRY = 32 << 20
"""Most bytes of an entry of the cache that is read. Of 32 layers it takes less than half a million."""

CACHE_BYTES, CACHE_ENTRIES = 64 << 20, 256
"""Most bytes and most entries of the cache. An entry of 32 layers takes half a megabyte."""

# A call is captured in the background (runtime/background.py)

BACKGROUND_SECONDS = 300.0
"""Seconds that a process may capture in the background.

A capture of 16 layers (width 64, 16 + 4 positions, 32 segments) takes 3.5 s of a core, and took 20 s beside calls and
other processes that kept both cores busy. A child may wait forever for a lock that a thread of its parent held when it
was forked.
"""

BACKGROUND_PROCESSES = 2
"""Number of such processes in a row before a call is captured in the foreground.

A policy: the first call leaves what it makes in the model, so that the next one may have another fingerprint. Where
each call has its own, as where the model counts them, no process ever captures the next one.
"""

BACKGROUND_NICE = 5
"""Increment of the niceness of that process: where cores are few, calls as written come first.

With 10 that capture took 45 s beside them, and a call as written the same time.
"""

# A loop is found and divided (passes/)

HISTORY_PARTS = 4
"""Most parts of a history that is read part by part, so that a reader waits for its own parts alone.

A policy: a memory of distance 3 has three parts, and each part is a value of its own in each cell.
"""

CHECKED_ELEMENTS = 2**20
"""Most numbers of elements that the check of a graph holds, before it drops the oldest: 8 MiB.

A policy: a value has two numbers for each run of positions that is moved as one. The examples have 10,000 at most,
also with 1,024 features, 512 positions and a vocabulary of 32,000.
"""

LAYER_PARTS = 8
"""Most parts of a layer. With more, a step runs so little that the diagonal of whole cells is faster.

A guess: a layer has some tens of operations, each of which costs a launch in each part's step.
"""

OPERATIONS_COUNTED = 2_000_000
"""Most operations of a call whose longest chain is searched, about 2 s of work."""

LONG_CALL = 64
"""Number of segments at which schedules are compared, if a call has more: the ratios stay the same.

At 8 layers the ramps of a wavefront take 7 of 71 steps there, and 7 of 519 at 512 segments.
"""

BLOCKS_ASSUMED = 8
"""Number of blocks assumed before shapes are known. A guess: a block has 512 positions, a text some thousands."""

# Bodies and kernels are made (passes/bodies/, ops/, codegen/)

BODIES_ALIKE = 0.5
"""Two bodies are merged if they share at least this share of the operations of the larger one.

A guess: a merged body runs all of both for each cell, so with half in common it does at most one and a half times the
work, in one group instead of two.
"""

KERNEL_TILE = 128
"""Rows and columns of the tile that is assumed to estimate a kernel's reads and the turns of its loop.

The tiles of products of 128 rows and more have so many (`passes/bodies/tiles.py`).
"""

KERNEL_ROW = 8192
"""Columns per tile of a kernel that sums over rows and multiplies nothing. A guess: not measured on a GPU yet."""

LINEARS_LEAST = 1 << 18
"""Least number of multiplications per cell for which the kernel is compiled and measured.

Up to so many it was never faster than a batched product, of 1 to 256 rows (`benchmarks/limits.py kernels`).
"""

LINEARS_PASS = 1 << 19
"""Bytes of x that a tile of columns goes over, of as many rows of a cell as fit, of 192 at least.

Half of the second-level cache of a core. 576 rows of 256 or 1,024 were multiplied at 200 Gflop/s in passes of 2^17 to
2^19 bytes, at 185 in passes of 2^20, and at 175 in one.
"""

LINEARS_TRIED_BYTES = 1 << 20
"""Most bytes of x per cell with which the kernel is measured: more rows go over the weights in more passes."""

LINEARS_TRIED = 4, 16
"""Fewest and most cells with which the kernel is measured: groups have as many as a model has layers."""

LINEARS_TRIED_WEIGHTS, LINEARS_TRIED_PRODUCTS = 1 << 23, 1 << 30
"""Most weights and multiplications with which the kernel is measured: it takes some tenths of a second at most."""

LINEARS_MARGIN = 0.95
"""The kernel runs if it takes less than this share of the time of the batched product.

The fastest of 5 turns differs by some percent from measurement to measurement.
"""

ATTENTION_CELLS = 8
"""Number of cells with which attention as two products is measured: groups have as many as a model has layers."""

ATTENTION_SCORES = 1 << 14
"""Most scores of a head for which attention may run as two products, which hold them in memory.

In times of torch's kernel they take 0.56 to 0.75 for up to 64 positions, 1.03 for 128 and 2.45 for 256
(`benchmarks/limits.py attention`).
"""

ATTENTION_MARGIN = 0.87
"""Attention as two products runs if it takes less than this share of the time of torch's kernel.

A guess: its scores take memory that other operations need, which a measurement of attention alone does not show.
"""

TILE_ELEMENTS = 8192
"""Most elements per side of a tile that a file of configurations may ask for. Triton allows 2^20 in a block."""

HEAVY_PRODUCT = 3
"""A product whose factor is computed by so many operations has smaller tiles, for its values need registers, too.

With larger tiles registers of the memory's update in ARMT, 1B, were spilled.
"""

ATTENTION_HEAD = 128
"""Size of a head up to which 128 queries are a tile of attention, in 16 bits: with larger ones registers spill."""

ROWS_TILE, LONG_KERNEL = 2048, 24
"""Elements of a tile of a kernel that multiplies nothing; one of so many loads and operations has half as many.

Registers of ARMT's feature map, which is 40 operations, were spilled on sm_80.
"""
