//! The arithmetic of one item: a group of query rows against the tiles of its splits.

use super::plan::{Group, Item, partial_row_len};
use super::{Call, KvDtype, SPLIT, TILE};
use crate::simd::{LANES, Lanes, prefetch};

/// Sizes of the memory that one thread works in.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    head_dim: usize,
    /// `head_dim` rounded up to whole vectors.
    padded: usize,
    rows: usize,
}

impl Tile {
    pub fn new(head_dim: usize, rows: usize) -> Self {
        Self { head_dim, padded: head_dim.next_multiple_of(LANES), rows }
    }

    /// Elements that [`Slot::cut`] needs.
    pub fn slot_len(&self) -> usize {
        let keys = self.head_dim * TILE;
        let values = self.padded * TILE;
        let of_rows = self.rows * (self.head_dim + 2 * self.padded + LANES + 3);
        (keys + values + ROWS_TOGETHER * TILE + of_rows).next_multiple_of(LANES)
    }
}

/// The parts of a thread's memory.
struct Slot<'a> {
    /// [head_dim, TILE]: keys of the tile, transposed.
    keys: &'a mut [f32],
    /// [TILE, padded]
    values: &'a mut [f32],
    /// [ROWS_TOGETHER, TILE]: scores, then their exponentials.
    scores: &'a mut [f32],
    /// [rows, head_dim]: queries times scale.
    queries: &'a mut [f32],
    /// [rows, padded], [rows], [rows, LANES]: state of the split.
    split_out: &'a mut [f32],
    split_max: &'a mut [f32],
    split_sum: &'a mut [f32],
    /// [rows, padded], [rows], [rows]: the splits before it, merged.
    total_out: &'a mut [f32],
    total_max: &'a mut [f32],
    total_sum: &'a mut [f32],
}

impl<'a> Slot<'a> {
    fn cut(tile: &Tile, mut memory: &'a mut [f32]) -> Self {
        let mut take = |len| memory.split_off_mut(..len).expect("sized by slot_len");
        Self {
            keys: take(tile.head_dim * TILE),
            values: take(tile.padded * TILE),
            scores: take(ROWS_TOGETHER * TILE),
            split_out: take(tile.rows * tile.padded),
            split_sum: take(tile.rows * LANES),
            total_out: take(tile.rows * tile.padded),
            queries: take(tile.rows * tile.head_dim),
            split_max: take(tile.rows),
            total_max: take(tile.rows),
            total_sum: take(tile.rows),
        }
    }
}

/// Computes one item: a split into its partial results, or all splits into the output.
///
/// # Safety
/// `attend` has checked all shapes, rows and blocks, and nobody else runs the same item.
#[inline(always)]
pub(super) unsafe fn run_item<L: Lanes>(call: &Call<'_>, item: Item, memory: &mut [f32]) {
    let group = &call.plan.groups[item.group];
    let mut slot = Slot::cut(&call.tile, memory);
    let work = Work::new(call, item);
    // SAFETY: the promise of the caller.
    unsafe {
        work.pack_queries::<L>(&mut slot);
        if let Some(split) = item.split {
            work.run_split::<L>(&mut slot, split);
            let len = work.rows * partial_row_len(call.tile.head_dim);
            let at = group.partials + (split - group.splits.0) * len;
            work.save_partial::<L>(&slot, split, call.partials.add(at));
            return;
        }
        for split in group.splits.0..group.splits.1 {
            work.run_split::<L>(&mut slot, split);
            for row in work.rows_of(split * SPLIT, SPLIT) {
                let first = work.first_split(row) == split;
                let from = slot.split_out.as_ptr().add(row * call.tile.padded);
                let sum = L::load(slot.split_sum.as_ptr().add(row * LANES)).sum();
                work.merge::<L>(&mut slot.total_out[row * call.tile.padded..], from, first, {
                    let total = (&mut slot.total_max[row], &mut slot.total_sum[row]);
                    (total.0, total.1, slot.split_max[row], sum)
                });
            }
        }
        work.write_out::<L>(&slot);
    }
}

/// Merges the partial results of a group in ascending order of splits and writes the output.
///
/// # Safety
/// As [`run_item`], and all items of the group are done and their writes visible.
#[inline(always)]
pub(super) unsafe fn merge_partials<L: Lanes>(call: &Call<'_>, item: Item, memory: &mut [f32]) {
    let group = &call.plan.groups[item.group];
    let slot = Slot::cut(&call.tile, memory);
    let work = Work::new(call, item);
    let padded = call.tile.padded;
    let row_len = partial_row_len(call.tile.head_dim);
    for split in group.splits.0..group.splits.1 {
        for row in work.rows_of(split * SPLIT, SPLIT) {
            let first = work.first_split(row) == split;
            let at = ((split - group.splits.0) * work.rows + row) * row_len + group.partials;
            // SAFETY: inside the partials of the group, by the size that the plan gave them.
            unsafe {
                let from = call.partials.add(at).cast_const();
                let (max, sum) = (*from.add(padded), *from.add(padded + 1));
                let total = (&mut slot.total_max[row], &mut slot.total_sum[row], max, sum);
                work.merge::<L>(&mut slot.total_out[row * padded..], from, first, total);
            }
        }
    }
    // SAFETY: the promise of the caller.
    unsafe { work.write_out::<L>(&slot) };
}

/// An item with the numbers that its loops need. Row r is query head `r % sharing` of its group's token
/// `r / sharing`.
#[derive(Clone, Copy)]
struct Work<'a> {
    call: &'a Call<'a>,
    group: &'a Group,
    blocks: &'a [u32],
    /// Position of the first token.
    position: usize,
    /// Positions of the item that some row sees: from the first tile to before the end.
    first_tile: usize,
    end: usize,
    sharing: usize,
    rows: usize,
}

impl<'a> Work<'a> {
    #[inline(always)]
    fn new(call: &'a Call<'a>, item: Item) -> Self {
        let group = &call.plan.groups[item.group];
        let sequence = &call.sequences[group.sequence];
        let sharing = call.params.heads / call.kv.layout.kv_heads;
        let position = sequence.position + group.first_token;
        let (start, end) = match item.split {
            Some(split) => (split * SPLIT, (split + 1) * SPLIT),
            None => (0, usize::MAX),
        };
        Self {
            call,
            group,
            blocks: sequence.blocks,
            position,
            first_tile: call.visible(position).0.max(start) / TILE * TILE,
            end: end.min(position + group.tokens),
            sharing,
            rows: group.tokens * sharing,
        }
    }

    /// Positions that `row` sees: from the first to before the second.
    #[inline(always)]
    fn visible(&self, row: usize) -> (usize, usize) {
        self.call.visible(self.position + row / self.sharing)
    }

    /// Rows that see any of the `len` positions from `start`. They are consecutive, for both ends of
    /// what a row sees grow with its token.
    #[inline(always)]
    fn rows_of(&self, start: usize, len: usize) -> std::ops::Range<usize> {
        let tokens = self.group.tokens;
        let begin = start.saturating_sub(self.position).min(tokens);
        let end = match self.call.params.window {
            // The last position of the range has left the window of tokens from here on.
            Some(window) => (start + len - 1 + window).saturating_sub(self.position).min(tokens),
            None => tokens,
        };
        begin * self.sharing..end.max(begin) * self.sharing
    }

    /// The first split that `row` sees a position of.
    #[inline(always)]
    fn first_split(&self, row: usize) -> usize {
        self.visible(row).0 / SPLIT
    }

    /// Offset of a row's query head in q and the output.
    #[inline(always)]
    fn offset(&self, row: usize) -> usize {
        let first_row = self.call.sequences[self.group.sequence].first_row;
        let token = first_row + self.group.first_token + row / self.sharing;
        let head = self.group.kv_head * self.sharing + row % self.sharing;
        (token * self.call.params.heads + head) * self.call.tile.head_dim
    }

    #[inline(always)]
    unsafe fn pack_queries<L: Lanes>(&self, slot: &mut Slot<'_>) {
        let head_dim = self.call.tile.head_dim;
        let scale = self.call.params.scale;
        for row in 0..self.rows {
            let from = &self.call.q[self.offset(row)..][..head_dim];
            let to = &mut slot.queries[row * head_dim..][..head_dim];
            for (t, f) in to.iter_mut().zip(from) {
                *t = f * scale;
            }
        }
    }

    /// What this thread needs after the tile at `start`: the next one, or the first of the item that is
    /// to be taken next.
    #[inline(always)]
    fn after(&self, start: usize) -> (Work<'a>, usize) {
        let next = start + TILE;
        match self.call.plan.peek() {
            Some(item) if next >= self.end => {
                let work = Work::new(self.call, item);
                (work, work.first_tile)
            }
            _ => (*self, next),
        }
    }

    /// Runs the tiles of one split in ascending order, from an empty state.
    #[inline(always)]
    unsafe fn run_split<L: Lanes>(&self, slot: &mut Slot<'_>, split: usize) {
        let padded = self.call.tile.padded;
        let rows = self.rows_of(split * SPLIT, SPLIT);
        slot.split_max[rows.clone()].fill(f32::NEG_INFINITY);
        slot.split_sum[rows.start * LANES..rows.end * LANES].fill(0.0);
        slot.split_out[rows.start * padded..rows.end * padded].fill(0.0);
        for start in (split * SPLIT..(split + 1) * SPLIT).step_by(TILE) {
            let rows = self.rows_of(start, TILE);
            if rows.is_empty() {
                continue;
            }
            let first = self.visible(rows.start).0.max(start);
            let last = self.visible(rows.end - 1).1.min(start + TILE);
            // SAFETY: positions from `first` to `last` are seen by some row, so their blocks exist;
            // the slot has the sizes that the kernels expect.
            unsafe {
                self.convert::<L>(slot, start, first, last);
                for row in rows.clone().step_by(ROWS_TOGETHER) {
                    let count = ROWS_TOGETHER.min(rows.end - row);
                    for at in (0..count).step_by(L::ROWS) {
                        self.scores::<L>(slot, row, at, L::ROWS.min(count - at));
                    }
                    let seen = self.exponentials::<L>(slot, start, row, count);
                    for at in (0..count).step_by(L::ROWS) {
                        let seen = &seen[at..count.min(at + L::ROWS)];
                        self.accumulate::<L>(slot, row, at, seen);
                    }
                }
            }
        }
    }

    /// Where the keys of positions `first..last` of the tile at `start` are stored; the other places
    /// repeat one of them.
    #[inline(always)]
    fn stored(&self, start: usize, first: usize, last: usize) -> [*const u8; TILE] {
        let layout = &self.call.kv.layout;
        let block_tokens = layout.block_tokens;
        let plane = layout.key_plane(self.call.params.layer, self.group.kv_head);
        let mut rows = [std::ptr::null::<u8>(); TILE];
        let (mut block, mut in_block) = (first / block_tokens, first % block_tokens);
        for position in first..last {
            let at = self.blocks[block] as usize * layout.block_bytes()
                + plane
                + in_block * layout.row_bytes();
            rows[position - start] = self.call.kv.storage[at..].as_ptr();
            in_block += 1;
            if in_block == block_tokens {
                (block, in_block) = (block + 1, 0);
            }
        }
        let any = rows[first - start];
        rows[..first - start].fill(any);
        rows[last - start..].fill(any);
        rows
    }

    /// Asks for the keys and values of `len` positions from `start`, as far as rows see them, to come
    /// to the cache. Blocks lie too far apart for the hardware to guess the next one.
    #[inline(always)]
    fn prefetch(&self, start: usize, len: usize) {
        let layout = &self.call.kv.layout;
        let end = (start + len).min(self.end);
        let keys = layout.key_plane(self.call.params.layer, self.group.kv_head);
        let to_values = layout.kv_heads * layout.plane_bytes();
        let mut position = start;
        while position < end {
            let in_block = position % layout.block_tokens;
            let tokens = (layout.block_tokens - in_block).min(end - position);
            let block = self.blocks[position / layout.block_tokens] as usize;
            let at = block * layout.block_bytes() + keys + in_block * layout.row_bytes();
            let bytes = tokens * layout.row_bytes();
            let run = &self.call.kv.storage[at..at + to_values + bytes];
            for line in (0..bytes).step_by(CACHE_LINE) {
                prefetch(&run[line]);
                prefetch(&run[to_values + line]);
            }
            position += tokens;
        }
    }

    /// Fills the slot's keys and values with positions `first..last` of the tile at `start`. What lies
    /// outside stays as it was: keys there give scores that are masked, values are not read.
    #[inline(always)]
    unsafe fn convert<L: Lanes>(
        &self,
        slot: &mut Slot<'_>,
        start: usize,
        first: usize,
        last: usize,
    ) {
        let layout = &self.call.kv.layout;
        let keys = self.stored(start, first, last);
        let (low, high) = (first - start, last - start);
        // SAFETY: each pointer is to a row of keys inside the storage, and its values lie in the same
        // block.
        unsafe {
            match layout.dtype {
                KvDtype::F16 => self.convert_rows::<L, F16>(slot, &keys, start, low, high),
                KvDtype::Bf16 => self.convert_rows::<L, Bf16>(slot, &keys, start, low, high),
                KvDtype::F32 => self.convert_rows::<L, F32>(slot, &keys, start, low, high),
            }
        }
    }

    #[inline(always)]
    unsafe fn convert_rows<L: Lanes, E: Element>(
        &self,
        slot: &mut Slot<'_>,
        rows: &[*const u8; TILE],
        start: usize,
        low: usize,
        high: usize,
    ) {
        let layout = &self.call.kv.layout;
        let to_values = layout.kv_heads * layout.plane_bytes();
        let Tile { head_dim, padded, .. } = self.call.tile;
        // Asked for a few at a time: all at once are more than a core can wait for.
        let (after, next) = self.after(start);
        let whole = head_dim / LANES * LANES;
        // SAFETY: loads stay inside a row; the stores stay inside [head_dim, TILE] and
        // [TILE, padded], of which `d + j < head_dim`, `position < TILE` and `d < padded` are indices.
        unsafe {
            let keys = slot.keys.as_mut_ptr();
            for lanes in (low / LANES * LANES..high).step_by(LANES) {
                after.prefetch(next + lanes / 2, LANES / 2);
                let rows: &[*const u8; LANES] =
                    rows[lanes..].first_chunk().expect("a tile is whole vectors");
                for d in (0..whole).step_by(LANES) {
                    let to = keys.add(d * TILE + lanes);
                    let mut square = [L::splat(0.0); LANES];
                    for i in 0..LANES {
                        square[i] = E::load::<L>(rows[i].add(d * E::BYTES));
                    }
                    L::transpose(&mut square);
                    for j in 0..LANES {
                        square[j].store(to.add(j * TILE));
                    }
                }
                if whole < head_dim {
                    let to = keys.add(whole * TILE + lanes);
                    transpose_part::<L, E>(rows, whole, head_dim - whole, to);
                }
            }
            let values = slot.values.as_mut_ptr();
            for position in low..high {
                if position.is_multiple_of(LANES) {
                    after.prefetch(next + TILE / 2 + position / 2, LANES / 2);
                }
                let row = rows[position].add(to_values);
                let to = values.add(position * padded);
                for d in (0..whole).step_by(LANES) {
                    E::load::<L>(row.add(d * E::BYTES)).store(to.add(d));
                }
                if whole < head_dim {
                    let from = row.add(whole * E::BYTES);
                    load_element_part::<L, E>(from, head_dim - whole).store(to.add(whole));
                }
            }
        }
    }

    /// Scores of `count` rows for all positions of the tile, from the `at`th of those that begin at
    /// `row`.
    #[inline(always)]
    unsafe fn scores<L: Lanes>(&self, slot: &mut Slot<'_>, row: usize, at: usize, count: usize) {
        let head_dim = self.call.tile.head_dim;
        let queries = slot.queries[(row + at) * head_dim..].as_ptr();
        let keys = slot.keys.as_ptr();
        let scores = slot.scores[at * TILE..].as_mut_ptr();
        // SAFETY: `count` rows of queries and of scores exist, and the keys are [head_dim, TILE].
        unsafe {
            for_rows!(L, count, dot_tile(queries, head_dim, keys, scores));
        }
    }

    /// Turns scores into exponentials and moves the maxima, sums and outputs of the rows to the new
    /// maximum. Returns which positions of the tile each row sees.
    #[inline(always)]
    unsafe fn exponentials<L: Lanes>(
        &self,
        slot: &mut Slot<'_>,
        start: usize,
        row: usize,
        count: usize,
    ) -> [(usize, usize); ROWS_TOGETHER] {
        let padded = self.call.tile.padded;
        let mut seen = [(0, 0); ROWS_TOGETHER];
        for i in 0..count {
            let (first, last) = self.visible(row + i);
            let (low, high) = (first.max(start) - start, last.min(start + TILE) - start);
            seen[i] = (low, high);
            let scores = slot.scores[i * TILE..][..TILE].as_mut_ptr();
            let sums = slot.split_sum[(row + i) * LANES..][..LANES].as_mut_ptr();
            // SAFETY: a row of scores has TILE elements, sums have LANES.
            unsafe {
                let mut lanes = [L::splat(0.0); TILE / LANES];
                for j in 0..TILE / LANES {
                    lanes[j] = L::load(scores.add(j * LANES));
                }
                if high - low < TILE {
                    let hidden = L::splat(f32::NEG_INFINITY);
                    let mask = (u64::MAX >> (TILE - (high - low))) << low;
                    for j in 0..TILE / LANES {
                        lanes[j] = lanes[j].select(hidden, (mask >> (j * LANES)) as u16);
                    }
                }
                let tile_max = lanes[0].max(lanes[1]).max(lanes[2].max(lanes[3])).greatest();
                let old_max = slot.split_max[row + i];
                let max = if tile_max > old_max { tile_max } else { old_max };
                let mut sum = L::load(sums);
                if max > old_max {
                    slot.split_max[row + i] = max;
                    if old_max > f32::NEG_INFINITY {
                        let shrink = L::splat(old_max - max).exp();
                        sum = sum.mul(shrink);
                        let out = slot.split_out[(row + i) * padded..][..padded].as_mut_ptr();
                        for d in (0..padded).step_by(LANES) {
                            L::load(out.add(d)).mul(shrink).store(out.add(d));
                        }
                    }
                }
                let max = L::splat(max);
                for j in 0..TILE / LANES {
                    let e = lanes[j].sub(max).exp();
                    sum = sum.add(e);
                    e.store(scores.add(j * LANES));
                }
                sum.store(sums);
            }
        }
        seen
    }

    /// Adds exponentials times values to the outputs of rows, from the `at`th of those that begin at
    /// `row`. Positions that all of them see are taken for all at once; those before and behind, row by
    /// row.
    #[inline(always)]
    unsafe fn accumulate<L: Lanes>(
        &self,
        slot: &mut Slot<'_>,
        row: usize,
        at: usize,
        seen: &[(usize, usize)],
    ) {
        let padded = self.call.tile.padded;
        let common_low = seen.iter().map(|s| s.0).max().unwrap_or(0);
        let common_high = seen.iter().map(|s| s.1).min().unwrap_or(0).max(common_low);
        let scores = slot.scores[at * TILE..].as_ptr();
        let values = slot.values.as_ptr();
        let out = slot.split_out[(row + at) * padded..].as_mut_ptr();
        // SAFETY: the rows have scores and outputs, and positions that a row sees have values.
        unsafe {
            for (i, &(low, high)) in seen.iter().enumerate() {
                let (scores, out) = (scores.add(i * TILE), out.add(i * padded));
                weigh::<L, 1, 4>(scores, values, padded, low, high.min(common_low), out);
            }
            let (low, high) = (common_low, common_high);
            for_rows!(L, seen.len(), weigh(scores, values, padded, low, high, out));
            for (i, &(low, high)) in seen.iter().enumerate() {
                let (scores, out) = (scores.add(i * TILE), out.add(i * padded));
                weigh::<L, 1, 4>(scores, values, padded, low.max(common_high), high, out);
            }
        }
    }

    /// Writes the state of a split as the partial results of all rows; rows that see nothing of it
    /// are left out.
    #[inline(always)]
    unsafe fn save_partial<L: Lanes>(&self, slot: &Slot<'_>, split: usize, to: *mut f32) {
        let Tile { head_dim, padded, .. } = self.call.tile;
        for row in self.rows_of(split * SPLIT, SPLIT) {
            // SAFETY: `to` has room for `partial_row_len` elements of each row.
            unsafe {
                let to = to.add(row * partial_row_len(head_dim));
                let from = slot.split_out[row * padded..][..padded].as_ptr();
                std::ptr::copy_nonoverlapping(from, to, padded);
                *to.add(padded) = slot.split_max[row];
                *to.add(padded + 1) = L::load(slot.split_sum[row * LANES..].as_ptr()).sum();
            }
        }
    }

    /// Merges one row's state of a split, `(.., .., max, sum)` and `from`, into its total.
    #[inline(always)]
    unsafe fn merge<L: Lanes>(
        &self,
        total_out: &mut [f32],
        from: *const f32,
        first: bool,
        (total_max, total_sum, max, sum): (&mut f32, &mut f32, f32, f32),
    ) {
        let padded = self.call.tile.padded;
        // SAFETY: both outputs have `padded` elements.
        unsafe {
            if first {
                std::ptr::copy_nonoverlapping(from, total_out.as_mut_ptr(), padded);
                (*total_max, *total_sum) = (max, sum);
                return;
            }
            let new_max = if max > *total_max { max } else { *total_max };
            let old_factor = L::splat(*total_max - new_max).exp();
            let factor = L::splat(max - new_max).exp();
            let out = total_out[..padded].as_mut_ptr();
            for d in (0..padded).step_by(LANES) {
                let kept = L::load(out.add(d)).mul(old_factor);
                L::load(from.add(d)).fma(factor, kept).store(out.add(d));
            }
            let kept = L::splat(*total_sum).mul(old_factor);
            *total_sum = L::splat(sum).fma(factor, kept).to_array()[0];
            *total_max = new_max;
        }
    }

    /// Divides the totals by their sums into the output.
    #[inline(always)]
    unsafe fn write_out<L: Lanes>(&self, slot: &Slot<'_>) {
        let Tile { head_dim, padded, .. } = self.call.tile;
        for row in 0..self.rows {
            let from = slot.total_out[row * padded..][..padded].as_ptr();
            // SAFETY: `offset` is inside the output, which has `head_dim` elements there that only
            // this item writes.
            unsafe {
                let to = self.call.out.add(self.offset(row));
                let sum = L::splat(slot.total_sum[row]);
                let whole = head_dim / LANES * LANES;
                for d in (0..whole).step_by(LANES) {
                    L::load(from.add(d)).div(sum).store(to.add(d));
                }
                if whole < head_dim {
                    let quotient = L::load(from.add(whole)).div(sum);
                    quotient.store_part(to.add(whole), head_dim - whole);
                }
            }
        }
    }
}

/// Calls a kernel with the number of rows and of vectors beside each other whose sums fit into the
/// registers of the implementation.
macro_rules! for_rows {
    ($lanes:ident, $count:expr, $kernel:ident($($arg:expr),*)) => {
        match $count {
            1 => $kernel::<$lanes, 1, 4>($($arg),*),
            2 if $lanes::ROWS == 8 => $kernel::<$lanes, 2, 4>($($arg),*),
            3 if $lanes::ROWS == 8 => $kernel::<$lanes, 3, 4>($($arg),*),
            4 if $lanes::ROWS == 8 => $kernel::<$lanes, 4, 4>($($arg),*),
            5 if $lanes::ROWS == 8 => $kernel::<$lanes, 5, 2>($($arg),*),
            6 if $lanes::ROWS == 8 => $kernel::<$lanes, 6, 2>($($arg),*),
            7 if $lanes::ROWS == 8 => $kernel::<$lanes, 7, 2>($($arg),*),
            8 if $lanes::ROWS == 8 => $kernel::<$lanes, 8, 2>($($arg),*),
            2 if $lanes::ROWS < 8 => $kernel::<$lanes, 2, 2>($($arg),*),
            3 if $lanes::ROWS < 8 => $kernel::<$lanes, 3, 1>($($arg),*),
            4 if $lanes::ROWS < 8 => $kernel::<$lanes, 4, 1>($($arg),*),
            5 if $lanes::ROWS == 6 => $kernel::<$lanes, 5, 1>($($arg),*),
            6 if $lanes::ROWS == 6 => $kernel::<$lanes, 6, 1>($($arg),*),
            rows => unreachable!("{rows} rows where {} are taken at once", $lanes::ROWS),
        }
    };
}
use for_rows;

/// `scores[r][p] = sum over d of queries[r][d] * keys[d][p]` for R rows and all positions of a tile.
#[inline(always)]
unsafe fn dot_tile<L: Lanes, const R: usize, const N: usize>(
    queries: *const f32,
    head_dim: usize,
    keys: *const f32,
    scores: *mut f32,
) {
    // SAFETY: the caller promises [R, head_dim] queries, [head_dim, TILE] keys and [R, TILE] scores.
    unsafe {
        for p in (0..TILE).step_by(N * LANES) {
            let mut sums = [[L::splat(0.0); N]; R];
            for d in 0..head_dim {
                let k: [L; N] =
                    std::array::from_fn(|n| L::load(keys.add(d * TILE + p + n * LANES)));
                for r in 0..R {
                    let q = L::splat(*queries.add(r * head_dim + d));
                    for n in 0..N {
                        sums[r][n] = q.fma(k[n], sums[r][n]);
                    }
                }
            }
            for r in 0..R {
                for n in 0..N {
                    sums[r][n].store(scores.add(r * TILE + p + n * LANES));
                }
            }
        }
    }
}

/// `out[r] += sum over p in low..high of weights[r][p] * values[p]` for R rows.
#[inline(always)]
unsafe fn weigh<L: Lanes, const R: usize, const N: usize>(
    weights: *const f32,
    values: *const f32,
    padded: usize,
    low: usize,
    high: usize,
    out: *mut f32,
) {
    if low >= high {
        return;
    }
    let mut d = 0;
    // SAFETY: the caller promises [R, TILE] weights, [TILE, padded] values of which rows low..high
    // are filled, and [R, padded] outputs.
    unsafe {
        while d + N * LANES <= padded {
            weigh_columns::<L, R, N>(weights, values.add(d), padded, low, high, out.add(d));
            d += N * LANES;
        }
        while d < padded {
            weigh_columns::<L, R, 1>(weights, values.add(d), padded, low, high, out.add(d));
            d += LANES;
        }
    }
}

#[inline(always)]
unsafe fn weigh_columns<L: Lanes, const R: usize, const N: usize>(
    weights: *const f32,
    values: *const f32,
    padded: usize,
    low: usize,
    high: usize,
    out: *mut f32,
) {
    // SAFETY: as in `weigh`, for N vectors of columns.
    unsafe {
        let mut sums = [[L::splat(0.0); N]; R];
        for r in 0..R {
            for n in 0..N {
                sums[r][n] = L::load(out.add(r * padded + n * LANES));
            }
        }
        for p in low..high {
            let v: [L; N] = std::array::from_fn(|n| L::load(values.add(p * padded + n * LANES)));
            for r in 0..R {
                let w = L::splat(*weights.add(r * TILE + p));
                for n in 0..N {
                    sums[r][n] = w.fma(v[n], sums[r][n]);
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                sums[r][n].store(out.add(r * padded + n * LANES));
            }
        }
    }
}

/// How stored elements become f32.
trait Element {
    const BYTES: usize;
    /// Sixteen elements.
    ///
    /// # Safety
    /// They can be read, and the CPU has the features of `L`.
    unsafe fn load<L: Lanes>(from: *const u8) -> L;
}

struct F16;
struct Bf16;
struct F32;

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u8) -> L {
        // SAFETY: passed on.
        unsafe { L::load_f16(from.cast()) }
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u8) -> L {
        // SAFETY: passed on.
        unsafe { L::load_bf16(from.cast()) }
    }
}

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u8) -> L {
        // SAFETY: passed on.
        unsafe { L::load(from.cast()) }
    }
}

/// Elements `d..d + count`, `count < 16`, of sixteen rows: element `d + j` of row `i` goes to
/// `to[j * TILE + i]`.
#[inline(never)]
unsafe fn transpose_part<L: Lanes, E: Element>(
    rows: &[*const u8; LANES],
    d: usize,
    count: usize,
    to: *mut f32,
) {
    for (i, row) in rows.iter().enumerate() {
        // SAFETY: the caller promises the elements of each row and room in `to`.
        unsafe {
            let lanes = load_element_part::<L, E>(row.add(d * E::BYTES), count).to_array();
            for (j, &lane) in lanes[..count].iter().enumerate() {
                *to.add(j * TILE + i) = lane;
            }
        }
    }
}

/// The first `count < 16` elements, zeros behind them.
#[inline(never)]
unsafe fn load_element_part<L: Lanes, E: Element>(from: *const u8, count: usize) -> L {
    let mut bytes = [0u8; 4 * LANES];
    // SAFETY: `count` elements can be read, by the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), count * E::BYTES);
        E::load::<L>(bytes.as_ptr())
    }
}

/// Rows that meet a tile's keys one after the other, then its values: with heads of 64 dimensions the
/// first cache holds what either takes, and not both. A multiple of each [`Lanes::ROWS`].
const ROWS_TOGETHER: usize = 24;
const CACHE_LINE: usize = 64;
