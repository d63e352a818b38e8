//! How the work of one call is cut and shared. Nothing here can change a result.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::{AttentionParams, KvLayout, SPLIT, SequenceQueries};

/// Query rows (tokens of one sequence times the query heads of one KV head) that see the same tiles.
#[derive(Debug)]
pub(super) struct Group {
    pub sequence: usize,
    pub kv_head: usize,
    pub first_token: usize,
    pub tokens: usize,
    /// The splits that some row sees: from the first to before the second.
    pub splits: (usize, usize),
    /// Where its partial results begin: one set of rows for each split.
    pub partials: usize,
    /// Splits that are not done yet.
    pub remaining: AtomicU32,
}

/// What a thread takes at once: one split of a group, or all of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub group: usize,
    pub split: Option<usize>,
    cost: usize,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub groups: Vec<Group>,
    items: Vec<Item>,
    next: AtomicUsize,
    slots: usize,
    rows_max: usize,
    partials_len: usize,
}

impl Plan {
    pub fn make(
        &mut self,
        layout: &KvLayout,
        params: &AttentionParams,
        sequences: &[SequenceQueries<'_>],
        threads: usize,
    ) {
        self.groups.clear();
        self.items.clear();
        self.partials_len = 0;
        self.rows_max = 0;
        let sharing = params.heads / layout.kv_heads;
        let rows: usize = sequences.iter().map(|s| s.tokens).sum::<usize>() * params.heads;
        // Tall groups convert a tile for more rows; with few rows, threads must not be left without.
        let rows_wanted = (rows / (4 * threads)).clamp(GROUP_ROWS_MIN, GROUP_ROWS_MAX);
        let tokens_wanted = (rows_wanted / sharing).max(1);
        let mut cost = 0;
        for (index, sequence) in sequences.iter().enumerate() {
            for kv_head in 0..layout.kv_heads {
                for first_token in (0..sequence.tokens).step_by(tokens_wanted) {
                    let tokens = tokens_wanted.min(sequence.tokens - first_token);
                    let first = sequence.position + first_token;
                    let start = visible(params.window, first).0;
                    let end = first + tokens;
                    self.push(index, kv_head, first_token, tokens, (start, end), sharing, layout);
                    cost += (end - start) * (tokens * sharing + TILE_COST_ROWS);
                }
            }
        }
        self.items.sort_unstable_by_key(|item| std::cmp::Reverse(item.cost));
        let worth_a_region = cost * layout.head_dim >= COST_WORTH_A_REGION;
        self.slots = if worth_a_region { threads.min(self.items.len()) } else { 1 };
        *self.next.get_mut() = 0;
    }

    fn push(
        &mut self,
        sequence: usize,
        kv_head: usize,
        first_token: usize,
        tokens: usize,
        (start, end): (usize, usize),
        sharing: usize,
        layout: &KvLayout,
    ) {
        let rows = tokens * sharing;
        let splits = (start / SPLIT, end.div_ceil(SPLIT));
        let count = splits.1 - splits.0;
        let group = self.groups.len();
        let partials = self.partials_len;
        self.rows_max = self.rows_max.max(rows);
        if count > 1 && rows <= SPLIT_ROWS_MAX {
            self.partials_len += count * rows * partial_row_len(layout.head_dim);
            let cost = SPLIT * (rows + TILE_COST_ROWS);
            let items = (splits.0..splits.1).map(|s| Item { group, split: Some(s), cost });
            self.items.extend(items);
        } else {
            let cost = (end - start) * (rows + TILE_COST_ROWS);
            self.items.push(Item { group, split: None, cost });
        }
        let remaining = AtomicU32::new(count as u32);
        self.groups.push(Group {
            sequence,
            kv_head,
            first_token,
            tokens,
            splits,
            partials,
            remaining,
        });
    }

    /// The next item that nobody has taken.
    pub fn claim(&self) -> Option<Item> {
        self.items.get(self.next.fetch_add(1, Ordering::Relaxed)).copied()
    }

    /// The item that is taken next, as it looks now.
    pub fn peek(&self) -> Option<Item> {
        self.items.get(self.next.load(Ordering::Relaxed)).copied()
    }

    /// Threads that there is work for, at least one.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Rows of the tallest group.
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Elements that all partial results take.
    pub fn partials_len(&self) -> usize {
        self.partials_len
    }
}

/// Positions that a row at `position` sees: from the first to before the second.
#[inline(always)]
pub(super) fn visible(window: Option<usize>, position: usize) -> (usize, usize) {
    (window.map_or(0, |w| (position + 1).saturating_sub(w)), position + 1)
}

/// Elements of one row's partial result: its output padded to whole vectors, its maximum, its sum.
pub(super) fn partial_row_len(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16) + 16
}

/// Rows of a group: at most so many that its state stays in the second-level cache, at least so many
/// that converting a tile does not cost more than using it.
const GROUP_ROWS_MAX: usize = 128;
const GROUP_ROWS_MIN: usize = 32;
/// Groups of more rows are not cut into splits: their partial results would take more memory than the
/// keys they come from.
const SPLIT_ROWS_MAX: usize = 32;
/// Converting a tile costs about as much as so many rows.
const TILE_COST_ROWS: usize = 6;
/// Multiply-adds that take about as long as starting a region.
const COST_WORTH_A_REGION: usize = 100_000;
