//! What steps and places have cost of late: moving averages of measured times.

use protocol::{Duration, Instant};

#[derive(Debug, Default)]
pub(super) struct Pace {
    began: Instant,
    prompt_tokens: usize,
    /// A step of decodes alone.
    decode_step: Option<Duration>,
    /// What one prompt token adds to a step.
    prompt_token: Option<Duration>,
    last_end: Option<Instant>,
    /// From one end of a sequence that ran to the next.
    between_ends: Duration,
}

impl Pace {
    /// A step with so many prompt tokens is handed out.
    pub fn begin_step(&mut self, now: Instant, prompt_tokens: usize) {
        (self.began, self.prompt_tokens) = (now, prompt_tokens);
    }

    pub fn end_step(&mut self, now: Instant) {
        let took = now.saturating_since(self.began);
        match u32::try_from(self.prompt_tokens).unwrap_or(u32::MAX) {
            0 => self.decode_step = Some(steady(self.decode_step, took, WHOLE)),
            n => {
                // What the decodes of the step would have cost anyway is not the prompt's: with it, few
                // prompt tokens would look dear and become ever fewer.
                let added = took.saturating_sub(self.decode_step.unwrap_or_default()) / n;
                // A handful of tokens costs what a step costs: that says little about a prompt.
                self.prompt_token = Some(steady(self.prompt_token, added, n.min(WHOLE)));
            }
        }
    }

    /// Prompt tokens that fit beside the decodes into a step of `target`; no limit while nothing has
    /// been measured.
    pub fn prompt_tokens_within(&self, target: Duration) -> usize {
        let Some(each) = self.prompt_token.filter(|each| !each.is_zero()) else {
            return usize::MAX;
        };
        let left = target.saturating_sub(self.decode_step.unwrap_or_default());
        let fit = usize::try_from(left.as_nanos() / each.as_nanos()).unwrap_or(usize::MAX);
        fit.max(PROMPT_TOKENS_MIN)
    }

    /// Prompt tokens per second; 0 while nothing has been measured.
    pub fn prompt_rate(&self) -> u32 {
        let each = self.prompt_token.unwrap_or_default().as_nanos();
        let rate = 1_000_000_000u128.checked_div(each).unwrap_or(0);
        u32::try_from(rate).unwrap_or(u32::MAX)
    }

    /// A step of decodes alone, of late; zero while nothing has been measured.
    pub fn decode_step(&self) -> Duration {
        self.decode_step.unwrap_or_default()
    }

    pub fn sequence_ended(&mut self, now: Instant) {
        if let Some(last) = self.last_end {
            self.between_ends = average(Some(self.between_ends), now.saturating_since(last), WHOLE);
        }
        self.last_end = Some(now);
    }

    /// When half of `queued` sequences will have moved up: half their number times the mean time
    /// between ends.
    pub fn retry_after(&self, queued: usize) -> Duration {
        let half = u32::try_from(queued / 2).unwrap_or(u32::MAX);
        self.between_ends.saturating_mul(half).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
    }
}

/// An eighth of it is new where it weighs [`WHOLE`], less where it weighs less.
fn average(before: Option<Duration>, now: Duration, weight: u32) -> Duration {
    let all = WHOLE * 8;
    before.map_or(now, |before| {
        before.saturating_mul(all - weight).saturating_add(now.saturating_mul(weight)) / all
    })
}

/// The same for what is the pace of the next steps, too. A process that was stopped, or a disk that
/// hung, made one step endless: that is no pace, and routers would send nothing here to correct it. A
/// machine that did become slow is believed after a few steps.
fn steady(before: Option<Duration>, now: Duration, weight: u32) -> Duration {
    let most = before.map_or(now, |before| before.saturating_mul(OUTLIER).max(TICK));
    average(before, now.min(most), weight)
}

/// Prompts go on at this rate at least, however slow the machine: below it the weights are read for
/// too little.
const PROMPT_TOKENS_MIN: usize = 32;
/// Prompt tokens of a step from which on it is taken for the pace of prompts.
const WHOLE: u32 = 64;
/// One measurement counts at most so many times the average before it.
const OUTLIER: u32 = 4;
/// What averages of nothing grow from.
const TICK: Duration = Duration::from_micros(1);
const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_endless_step_is_not_the_pace() {
        let mut pace = Pace::default();
        let mut now = Instant::ORIGIN;
        let mut step = |pace: &mut Pace, took: Duration| {
            pace.begin_step(now, 100);
            now = now + took;
            pace.end_step(now);
        };
        step(&mut pace, Duration::from_millis(100));
        assert_eq!(pace.prompt_rate(), 1000);
        step(&mut pace, Duration::from_secs(60));
        assert!((700..1000).contains(&pace.prompt_rate()), "{}", pace.prompt_rate());
        // A machine that is ten times as slow from now on is known for it soon.
        for _ in 0..30 {
            step(&mut pace, Duration::from_secs(1));
        }
        assert!((90..130).contains(&pace.prompt_rate()), "{}", pace.prompt_rate());
    }

    #[test]
    fn a_few_tokens_do_not_make_a_fast_machine_slow() {
        let mut pace = Pace::default();
        let mut now = Instant::ORIGIN;
        for (tokens, took_ms) in [(512, 512)].into_iter().chain([(4, 40); 20]) {
            pace.begin_step(now, tokens);
            now = now + Duration::from_millis(took_ms);
            pace.end_step(now);
        }
        assert!(pace.prompt_rate() > 600, "{}", pace.prompt_rate());
    }
}
