//! Grammar masks, computed beside the forward pass.
//!
//! The mask of the next token depends only on the tokens already taken, so a thread of its own
//! computes it while the executor computes the logits. No other stream waits for it.

use crate::grammar::{GrammarError, Matcher};
use protocol::SequenceId;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A matcher that came back, with its mask ready or the reason why there is none.
pub(super) struct Masked {
    pub matcher: Matcher,
    /// One bit a token.
    pub mask: Result<Vec<u32>, GrammarError>,
}

/// The thread. Queues hold at most one job for each running sequence.
pub(super) struct MaskThread {
    jobs: Sender<Matcher>,
    done: Receiver<Masked>,
    under_way: Vec<SequenceId>,
}

impl MaskThread {
    pub fn spawn() -> std::io::Result<Self> {
        let (jobs, inbox) = channel::<Matcher>();
        let (outbox, done) = channel();
        std::thread::Builder::new().name("grammar".to_owned()).spawn(move || {
            for mut matcher in inbox {
                let mask = matcher.mask().map(<[u32]>::to_vec);
                if outbox.send(Masked { matcher, mask }).is_err() {
                    return;
                }
            }
        })?;
        Ok(MaskThread { jobs, done, under_way: Vec::new() })
    }

    pub fn start(&mut self, sequence: SequenceId, matcher: Matcher) {
        self.under_way.push(sequence);
        // A thread that died is noticed when its answers are missing.
        let _ = self.jobs.send(matcher);
    }

    /// One entry for each sequence started since the last call, in that order; `None` for what a
    /// thread that died took with it.
    pub fn collect(&mut self) -> Vec<(SequenceId, Option<Masked>)> {
        let started = std::mem::take(&mut self.under_way);
        started.into_iter().map(|sequence| (sequence, self.done.recv().ok())).collect()
    }
}
