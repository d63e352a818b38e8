//! What steps and places have cost of late: moving averages of measured times.

use protocol::{Duration, Instant};

#[derive(Debug, Default)]
pub(super) struct Pace {
    began: Instant,
    prompt_tokens: usize,
    /// A step of decodes alone.
    decode_step: Mean,
    /// What one prompt token adds to a step.
    prompt_token: Mean,
    last_end: Option<Instant>,
    /// From one end of a sequence that ran to the next.
    between_ends: Mean,
}

impl Pace {
    /// A step with so many prompt tokens is handed out.
    pub fn begin_step(&mut self, now: Instant, prompt_tokens: usize) {
        (self.began, self.prompt_tokens) = (now, prompt_tokens);
    }

    pub fn end_step(&mut self, now: Instant) {
        let took = now.saturating_since(self.began);
        match u32::try_from(self.prompt_tokens).unwrap_or(u32::MAX) {
            0 => self.decode_step.add_steady(took, WHOLE),
            n => {
                // What the decodes of the step would have cost anyway is not the prompt's: with it, few
                // prompt tokens would look dear and become ever fewer.
                let added = took.saturating_sub(self.decode_step.value) / n;
                // A step's time is off by as much whatever is in it, so a token's by one part in `n` of
                // that: a measurement counts by the square of its tokens. The leftovers of prompts that
                // were computed elsewhere count only as long as nothing better is known: they are all off
                // to the same side, and a node may compute nothing else.
                let n = n.min(WHOLE_TOKENS);
                if n * n >= ENOUGH || self.prompt_token.weight < ENOUGH {
                    self.prompt_token.add_steady(added, n * n);
                }
            }
        }
    }

    /// Prompt tokens that fit beside the decodes into a step of `target`; no limit while nothing has
    /// been measured.
    pub fn prompt_tokens_within(&self, target: Duration) -> usize {
        let Some(each) = self.prompt_token().filter(|each| !each.is_zero()) else {
            return usize::MAX;
        };
        let left = target.saturating_sub(self.decode_step.value);
        let fit = usize::try_from(left.as_nanos() / each.as_nanos()).unwrap_or(usize::MAX);
        fit.max(PROMPT_TOKENS_MIN)
    }

    /// Prompt tokens per second, in steps of `step_tokens` with nothing else in them; 0 while nothing has
    /// been measured. What a step costs whatever is in it is a decode's, or a prompt's.
    pub fn prompt_rate(&self, step_tokens: usize) -> u32 {
        let Some(each) = self.prompt_token() else { return 0 };
        let tokens = step_tokens as u128;
        let step = self.decode_step.value.as_nanos() + each.as_nanos() * tokens;
        let rate = (tokens * 1_000_000_000).checked_div(step).unwrap_or(0);
        u32::try_from(rate).unwrap_or(u32::MAX)
    }

    /// A step of decodes alone, of late; zero while nothing has been measured.
    pub fn decode_step(&self) -> Duration {
        self.decode_step.value
    }

    /// `None` until enough has been measured to say it.
    fn prompt_token(&self) -> Option<Duration> {
        (self.prompt_token.weight >= ENOUGH).then_some(self.prompt_token.value)
    }

    pub fn sequence_ended(&mut self, now: Instant) {
        if let Some(last) = self.last_end {
            self.between_ends.add(now.saturating_since(last), WHOLE);
        }
        self.last_end = Some(now);
    }

    /// When half of `queued` sequences will have moved up: half their number times the mean time
    /// between ends.
    pub fn retry_after(&self, queued: usize) -> Duration {
        let half = u32::try_from(queued / 2).unwrap_or(u32::MAX);
        self.between_ends.value.saturating_mul(half).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX)
    }
}

/// What has been measured of late: the mean of all at first, then an eighth of it is new where that weighs
/// [`WHOLE`]. So the first measurement, which is of cold pages or of next to nothing, does not stay.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: Duration,
    /// Of all that it is made of, at most [`MEMORY`].
    weight: u32,
}

impl Mean {
    fn add(&mut self, now: Duration, weight: u32) {
        // What said little gives way to the first that says something.
        let is_first = self.weight < ENOUGH && weight >= ENOUGH;
        let kept = if is_first { 0 } else { self.weight.min(MEMORY - weight) };
        let sum = self.value.saturating_mul(kept).saturating_add(now.saturating_mul(weight));
        *self = Mean { value: sum / (kept + weight), weight: kept + weight };
    }

    /// The same for what is the pace of the next steps, too. A process that was stopped, or a disk that
    /// hung, made one step endless: that is no pace, and routers would send nothing here to correct it.
    /// A machine that did become slow is believed after a few steps.
    fn add_steady(&mut self, now: Duration, weight: u32) {
        let most = match self.weight >= WHOLE {
            true => self.value.saturating_mul(OUTLIER).max(TICK),
            false => now,
        };
        self.add(now.min(most), weight);
    }
}

/// Prompts go on at this rate at least, however slow the machine: below it the weights are read for
/// too little.
const PROMPT_TOKENS_MIN: usize = 16;
/// Prompt tokens of a step from which on it is taken for the pace of prompts.
const WHOLE_TOKENS: u32 = 64;
/// What such a step weighs, and any other that is a measurement of its own.
const WHOLE: u32 = WHOLE_TOKENS * WHOLE_TOKENS;
const MEMORY: u32 = 8 * WHOLE;
/// Weight from which on a pace of prompts is known: of one step with [`PROMPT_TOKENS_MIN`], for steps beside
/// decodes may have no more.
const ENOUGH: u32 = (PROMPT_TOKENS_MIN * PROMPT_TOKENS_MIN) as u32;
/// One measurement counts at most so many times the mean before it.
const OUTLIER: u32 = 4;
/// What means of nothing grow from.
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
        assert_eq!(pace.prompt_rate(512), 1000);
        (0..7).for_each(|_| step(&mut pace, Duration::from_millis(100)));
        step(&mut pace, Duration::from_secs(60));
        assert!((700..1000).contains(&pace.prompt_rate(512)), "{}", pace.prompt_rate(512));
        // A machine that is ten times as slow from now on is known for it soon.
        for _ in 0..30 {
            step(&mut pace, Duration::from_secs(1));
        }
        assert!((90..130).contains(&pace.prompt_rate(512)), "{}", pace.prompt_rate(512));
    }

    /// The rate after steps of so many prompt tokens that took so many milliseconds.
    fn rate_after(step_tokens: usize, steps: &[(usize, u64)]) -> u32 {
        let mut pace = Pace::default();
        let mut now = Instant::ORIGIN;
        for &(tokens, took_ms) in steps {
            pace.begin_step(now, tokens);
            now = now + Duration::from_millis(took_ms);
            pace.end_step(now);
        }
        pace.prompt_rate(step_tokens)
    }

    /// A machine that computes 1,000 prompt tokens a second, and whose shortest steps take 20 ms.
    #[test]
    fn a_few_tokens_do_not_make_a_fast_machine_slow() {
        let (decode, prompt, leftover) = ((0, 20), (512, 512), (8, 60));
        let from = |steps: &[&[(usize, u64)]]| rate_after(512, &steps.concat());
        assert_eq!(from(&[]), 0);
        // Slow steps with few tokens are slow, although a token adds little.
        assert_eq!(rate_after(32, &[decode, (32, 30)]), 32_000 / 30);
        // What a warm-up gives: cold, then a decode, then a prompt.
        assert_eq!(from(&[&[(1, 900), decode]]), 0, "one token says nothing");
        let warm = [(1, 900), decode, prompt];
        assert!((990..=1000).contains(&from(&[&warm])), "{}", from(&[&warm]));
        // A decoder whose prompts come from elsewhere computes what is left of them, at 200 a second.
        assert_eq!(from(&[&warm, &[leftover; 1000]]), from(&[&warm]));
        // Even as the first of all: one prompt is believed at once.
        let rate = from(&[&[decode], &[leftover; 1000], &[prompt]]);
        assert!((500..=1000).contains(&rate), "{rate}");
        // And what nothing else is known of is better than nothing.
        assert!((190..=210).contains(&from(&[&[decode], &[leftover; 1000]])));
        // Beside streams on a slow machine every step has the fewest tokens, and they are believed.
        let fewest = (PROMPT_TOKENS_MIN, 20 + 4 * PROMPT_TOKENS_MIN as u64);
        let rate = from(&[&warm, &[fewest; 500]]);
        assert!((240..=260).contains(&rate), "{rate}");
    }
}
