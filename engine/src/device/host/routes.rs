//! Which rows go to which experts.

use crate::device::ExpertRun;
use kernels::isa::Isa;
use kernels::ops;

/// The routes of a pass, ordered by expert, then by row.
#[derive(Debug, Default)]
pub struct Routes {
    routes: Vec<Route>,
    /// Experts of one row, best first.
    order: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Route {
    pub expert: u32,
    pub row: u32,
    pub weight: f32,
}

impl Routes {
    /// Chooses experts for each row of `scores`; of equal scores the lower expert wins.
    pub(super) fn choose(
        &mut self,
        isa: Isa,
        scores: &mut [f32],
        experts: usize,
        used: usize,
        normalize: bool,
    ) {
        self.routes.clear();
        for (row, scores) in scores.chunks_exact_mut(experts).enumerate() {
            ops::softmax(isa, scores);
            let score = |&e: &u32| scores[e as usize];
            self.order.clear();
            self.order.extend(0..experts as u32);
            self.order.sort_unstable_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
            let chosen = &self.order[..used];
            let sum = if normalize { chosen.iter().map(score).sum() } else { 1.0 };
            self.routes.extend(chosen.iter().map(|expert| Route {
                expert: *expert,
                row: row as u32,
                weight: score(expert) / sum,
            }));
        }
        self.routes.sort_unstable_by_key(|r| (r.expert, r.row));
    }

    /// The experts that have rows.
    pub(super) fn runs(&self, runs: &mut Vec<ExpertRun>) {
        runs.clear();
        let mut first = 0;
        for run in self.routes.chunk_by(|a, b| a.expert == b.expert) {
            runs.push(ExpertRun { expert: run[0].expert as usize, first, count: run.len() });
            first += run.len();
        }
    }

    pub(super) fn of(&self, run: ExpertRun) -> &[Route] {
        &self.routes[run.first..][..run.count]
    }
}
