//! What a step leaves: rows of logits and of hidden states.

use super::batch::wanted_rows;
use protocol::SequenceId;
use scheduler::{LogitsWanted, StepPlan};

/// The rows of one step, in buffers that the executor uses again for the next.
///
/// Entries are in the order of the plan's sequences, one for each.
#[derive(Debug, Default)]
pub struct StepOutput {
    entries: Vec<Entry>,
    vocab: usize,
    hidden_size: usize,
    /// `[rows, vocab]`, in plan order.
    pub(super) logits: Vec<f32>,
    /// `[rows, hidden]`, in plan order.
    pub(super) hidden: Vec<f32>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    sequence: SequenceId,
    wanted: LogitsWanted,
    /// First row in the buffer that `wanted` names.
    first: usize,
    rows: usize,
}

impl StepOutput {
    /// Sequences of the plan, those without rows included.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The sequence at `index` of the plan.
    pub fn sequence(&self, index: usize) -> Option<SequenceId> {
        self.entries.get(index).map(|e| e.sequence)
    }

    /// Logits of the sequence at `index` of the plan, `[rows, vocab]`: one row for `Last`, one for
    /// each token of the step for `All`, none otherwise.
    pub fn logits(&self, index: usize) -> &[f32] {
        self.logits_range(index).map_or(&[], |range| &self.logits[range])
    }

    /// As [`logits`](Self::logits), to be used as scratch by a sampler.
    pub fn logits_mut(&mut self, index: usize) -> &mut [f32] {
        match self.logits_range(index) {
            Some(range) => &mut self.logits[range],
            None => &mut [],
        }
    }

    /// Final hidden states, after the last norm, `[rows, hidden]`: one row for each token of the
    /// step where `Hidden` was wanted, none otherwise.
    pub fn hidden(&self, index: usize) -> &[f32] {
        match self.entries.get(index) {
            Some(e) if e.wanted == LogitsWanted::Hidden => {
                &self.hidden[e.first * self.hidden_size..][..e.rows * self.hidden_size]
            }
            _ => &[],
        }
    }

    /// Width of a row of logits.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Width of a row of hidden states.
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }

    fn logits_range(&self, index: usize) -> Option<std::ops::Range<usize>> {
        let e = self.entries.get(index).filter(|e| e.wanted != LogitsWanted::Hidden)?;
        Some(e.first * self.vocab..(e.first + e.rows) * self.vocab)
    }

    /// Lays the buffers out for `plan`. Gives back the memory of an unusually large step.
    pub(super) fn prepare(&mut self, plan: &StepPlan, vocab: usize, hidden_size: usize) {
        (self.vocab, self.hidden_size) = (vocab, hidden_size);
        self.entries.clear();
        let (mut logits_rows, mut hidden_rows) = (0, 0);
        for s in &plan.sequences {
            let rows = wanted_rows(s);
            let next = match s.wanted {
                LogitsWanted::Hidden => &mut hidden_rows,
                LogitsWanted::None | LogitsWanted::Last | LogitsWanted::All => &mut logits_rows,
            };
            let (sequence, wanted, first) = (s.sequence, s.wanted, *next);
            self.entries.push(Entry { sequence, wanted, first, rows });
            *next += rows;
        }
        fit(&mut self.logits, logits_rows * vocab);
        fit(&mut self.hidden, hidden_rows * hidden_size);
    }
}

fn fit(buffer: &mut Vec<f32>, len: usize) {
    if buffer.capacity() > RETAINED_VALUES_MAX.max(len) {
        buffer.truncate(len);
        buffer.shrink_to(RETAINED_VALUES_MAX);
    }
    buffer.resize(len, 0.0);
}

/// One row as [`step_each`](super::Executor::step_each) hands it out.
#[derive(Debug)]
pub struct OutputRow<'a> {
    pub sequence: SequenceId,
    /// Position of the token in its sequence.
    pub position: usize,
    pub values: RowValues<'a>,
}

/// The numbers of an [`OutputRow`]; the receiver may overwrite them.
#[derive(Debug)]
pub enum RowValues<'a> {
    /// `[vocab]`
    Logits(&'a mut [f32]),
    /// `[hidden]`, after the last norm
    Hidden(&'a mut [f32]),
}

/// Values that a buffer keeps between steps: 64 MiB. A larger step gives the excess back.
const RETAINED_VALUES_MAX: usize = 16 << 20;
