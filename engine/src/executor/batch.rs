//! A step plan checked and cut into passes.

use super::StepError;
use scheduler::{LogitsWanted, SequenceStep, StepPlan};

/// What the executor can hold: the bounds a plan is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlanLimits {
    pub vocab: usize,
    pub context_tokens_max: usize,
    pub block_tokens: usize,
    pub blocks: usize,
}

/// A run of consecutive tokens of one sequence inside one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Index into `StepPlan::sequences`.
    pub index: usize,
    /// First token of the run, as an index into the sequence's tokens of this step.
    pub first: usize,
    pub count: usize,
    /// Row of the pass that holds the first token.
    pub row: usize,
}

/// Checks plans; keeps its tables between steps.
#[derive(Debug, Default)]
pub(super) struct PlanChecker {
    ids: Vec<protocol::SequenceId>,
    /// For each block, what this step does with it.
    uses: Vec<BlockUse>,
    step: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct BlockUse {
    /// The step in which the rest was noted; an older note is void.
    step: u64,
    reader: u32,
    written: bool,
}

impl PlanChecker {
    /// Refuses whatever would index out of bounds or let one sequence see another's writes.
    pub fn check(&mut self, plan: &StepPlan, limits: &PlanLimits) -> Result<(), StepError> {
        self.ids.clear();
        self.ids.extend(plan.sequences.iter().map(|s| s.sequence));
        self.ids.sort_unstable();
        if let Some(pair) = self.ids.windows(2).find(|w| w[0] == w[1]) {
            return Err(StepError::SequenceTwice { sequence: pair[0] });
        }
        for sequence in &plan.sequences {
            check_sequence(sequence, limits)?;
        }
        self.check_blocks(plan, limits)
    }

    fn check_blocks(&mut self, plan: &StepPlan, limits: &PlanLimits) -> Result<(), StepError> {
        self.uses.resize(limits.blocks, BlockUse::default());
        self.step += 1;
        for (index, s) in plan.sequences.iter().enumerate() {
            let first_written = s.position / limits.block_tokens;
            let used = (s.position + s.tokens.len()).div_ceil(limits.block_tokens);
            for (entry, &block) in s.blocks[..used].iter().enumerate() {
                let written = entry >= first_written;
                let (sequence, capacity) = (s.sequence, limits.blocks);
                let Some(note) = self.uses.get_mut(block.0 as usize) else {
                    return Err(StepError::UnknownBlock { sequence, block, capacity });
                };
                if note.step == self.step {
                    let other = &plan.sequences[note.reader as usize];
                    if note.reader as usize == index {
                        return Err(StepError::BlockTwice { sequence, block });
                    }
                    if written || note.written {
                        let (writer, other) = match written {
                            true => (sequence, other.sequence),
                            false => (other.sequence, sequence),
                        };
                        return Err(StepError::BlockShared { block, writer, other });
                    }
                }
                *note = BlockUse { step: self.step, reader: index as u32, written };
            }
        }
        Ok(())
    }
}

fn check_sequence(s: &SequenceStep, limits: &PlanLimits) -> Result<(), StepError> {
    let sequence = s.sequence;
    if s.tokens.is_empty() {
        return Err(StepError::NoTokens { sequence });
    }
    let vocab = limits.vocab;
    if let Some(&token) = s.tokens.iter().find(|&&t| t as usize >= vocab) {
        return Err(StepError::UnknownToken { sequence, token, vocab });
    }
    let end = s.position.saturating_add(s.tokens.len());
    if end > limits.context_tokens_max {
        let context_tokens_max = limits.context_tokens_max;
        return Err(StepError::ContextExceeded { sequence, end, context_tokens_max });
    }
    let (have, need) = (s.blocks.len(), end.div_ceil(limits.block_tokens));
    if have < need {
        return Err(StepError::TableTooShort { sequence, have, need, end });
    }
    Ok(())
}

/// Cuts a checked plan into passes of at most `tokens_per_pass` tokens, sequences in plan order.
#[derive(Debug, Default)]
pub(super) struct PassCursor {
    index: usize,
    first: usize,
}

impl PassCursor {
    /// Fills `segments` with those of the next pass; empty when the plan is done.
    pub fn next(&mut self, plan: &StepPlan, tokens_per_pass: usize, segments: &mut Vec<Segment>) {
        segments.clear();
        let mut rows = 0;
        while let Some(s) = plan.sequences.get(self.index)
            && rows < tokens_per_pass
        {
            let count = (s.tokens.len() - self.first).min(tokens_per_pass - rows);
            segments.push(Segment { index: self.index, first: self.first, count, row: rows });
            rows += count;
            self.first += count;
            if self.first == s.tokens.len() {
                (self.index, self.first) = (self.index + 1, 0);
            }
        }
    }
}

/// The tokens of a segment whose final hidden state leaves the executor, as (first, count) within
/// the segment: always a suffix.
pub(super) fn wanted_suffix(s: &SequenceStep, segment: &Segment) -> (usize, usize) {
    let is_last = segment.first + segment.count == s.tokens.len();
    match s.wanted {
        LogitsWanted::None => (segment.count, 0),
        LogitsWanted::Last if is_last => (segment.count - 1, 1),
        LogitsWanted::Last => (segment.count, 0),
        LogitsWanted::All | LogitsWanted::Hidden => (0, segment.count),
    }
}

/// Rows of output that a sequence asks for: logits, or hidden states.
pub(super) fn wanted_rows(s: &SequenceStep) -> usize {
    match s.wanted {
        LogitsWanted::None => 0,
        LogitsWanted::Last => 1,
        LogitsWanted::All | LogitsWanted::Hidden => s.tokens.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cache::BlockId;
    use protocol::SequenceId;

    const LIMITS: PlanLimits =
        PlanLimits { vocab: 10, context_tokens_max: 20, block_tokens: 4, blocks: 6 };

    fn step(id: u64, tokens: &[u32], position: usize, blocks: &[u32]) -> SequenceStep {
        SequenceStep {
            sequence: SequenceId(id),
            tokens: tokens.to_vec(),
            position,
            blocks: blocks.iter().map(|&b| BlockId(b)).collect(),
            wanted: LogitsWanted::Last,
        }
    }

    fn check(sequences: Vec<SequenceStep>) -> Result<(), StepError> {
        PlanChecker::default().check(&StepPlan { sequences }, &LIMITS)
    }

    #[test]
    fn plans_refused_and_accepted() {
        let a = SequenceId(1);
        let cases: Vec<(Vec<SequenceStep>, Result<(), StepError>)> = vec![
            (vec![], Ok(())),
            (vec![step(1, &[1, 2], 0, &[0])], Ok(())),
            (vec![step(1, &[1, 2], 3, &[0, 5])], Ok(())),
            // A shared prefix: both only read block 0.
            (vec![step(1, &[1], 4, &[0, 1]), step(2, &[1], 4, &[0, 2])], Ok(())),
            // A table may be longer than what this step needs.
            (vec![step(1, &[1], 0, &[0, 3, 99])], Ok(())),
            (vec![step(1, &[], 0, &[0])], Err(StepError::NoTokens { sequence: a })),
            (
                vec![step(1, &[10], 0, &[0])],
                Err(StepError::UnknownToken { sequence: a, token: 10, vocab: 10 }),
            ),
            (
                vec![step(1, &[1], 20, &[0, 1, 2, 3, 4, 5])],
                Err(StepError::ContextExceeded { sequence: a, end: 21, context_tokens_max: 20 }),
            ),
            (
                vec![step(1, &[1], usize::MAX, &[0])],
                Err(StepError::ContextExceeded {
                    sequence: a,
                    end: usize::MAX,
                    context_tokens_max: 20,
                }),
            ),
            (
                vec![step(1, &[1, 1], 3, &[0])],
                Err(StepError::TableTooShort { sequence: a, have: 1, need: 2, end: 5 }),
            ),
            (
                vec![step(1, &[1], 0, &[6])],
                Err(StepError::UnknownBlock { sequence: a, block: BlockId(6), capacity: 6 }),
            ),
            (
                vec![step(1, &[1], 4, &[0, 0])],
                Err(StepError::BlockTwice { sequence: a, block: BlockId(0) }),
            ),
            (
                vec![step(1, &[1], 0, &[0]), step(1, &[1], 0, &[1])],
                Err(StepError::SequenceTwice { sequence: a }),
            ),
            (
                vec![step(1, &[1], 0, &[0]), step(2, &[1], 4, &[0, 1])],
                Err(StepError::BlockShared { block: BlockId(0), writer: a, other: SequenceId(2) }),
            ),
            (
                vec![step(2, &[1], 4, &[0, 1]), step(1, &[1], 4, &[2, 1])],
                Err(StepError::BlockShared { block: BlockId(1), writer: a, other: SequenceId(2) }),
            ),
        ];
        for (sequences, want) in cases {
            assert_eq!(check(sequences.clone()), want, "{sequences:?}");
        }
    }

    #[test]
    fn notes_of_an_older_step_are_void() {
        let mut checker = PlanChecker::default();
        for id in 1..4 {
            let plan = StepPlan { sequences: vec![step(id, &[1], 0, &[3])] };
            assert_eq!(checker.check(&plan, &LIMITS), Ok(()));
        }
    }

    #[test]
    fn passes_hold_every_token_once() {
        let plan = StepPlan {
            sequences: vec![
                step(1, &[1; 3], 0, &[0]),
                step(2, &[1; 7], 0, &[1, 2]),
                step(3, &[1], 0, &[3]),
            ],
        };
        let mut seen = Vec::new();
        let (mut cursor, mut segments) = (PassCursor::default(), Vec::new());
        loop {
            cursor.next(&plan, 4, &mut segments);
            if segments.is_empty() {
                break;
            }
            let rows: usize = segments.iter().map(|s| s.count).sum();
            assert!(rows <= 4);
            seen.extend(segments.iter().map(|s| (s.index, s.first, s.count, s.row)));
        }
        let want = [(0, 0, 3, 0), (1, 0, 1, 3), (1, 1, 4, 0), (1, 5, 2, 0), (2, 0, 1, 2)];
        assert_eq!(seen, want);
    }
}
