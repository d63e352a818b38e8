//! Requests that want rows instead of tokens: embeddings and scores.

use super::request::{EmbedRequest, Event, Pooling, ScoreRequest};
use crate::sampler::{SampledToken, log_sum_exp, top_tokens};
use protocol::TokenId;

/// A text on its way to one vector.
pub(super) struct Embedding {
    pooling: Pooling,
    /// Sum (or last) of the hidden states so far, `[hidden]`, added up token by token so that the
    /// cut into chunks changes no bit.
    sum: Vec<f32>,
    tokens: usize,
}

impl Embedding {
    pub fn new(request: &EmbedRequest) -> Self {
        Embedding { pooling: request.pooling, sum: Vec::new(), tokens: 0 }
    }

    /// Takes the states of the tokens from `position` on, `[tokens, hidden]`. A position of 0 starts
    /// again: the sequence was preempted.
    pub fn push(&mut self, position: usize, rows: &[f32], hidden: usize) {
        if position == 0 {
            self.sum = vec![0.0; hidden];
            self.tokens = 0;
        }
        for row in rows.chunks_exact(hidden) {
            match self.pooling {
                Pooling::Mean => self.sum.iter_mut().zip(row).for_each(|(s, x)| *s += x),
                Pooling::Last => self.sum.copy_from_slice(row),
            }
            self.tokens += 1;
        }
    }

    pub fn finish(&mut self) -> Event {
        let mut vector = std::mem::take(&mut self.sum);
        let norm: f64 = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        if norm > 0.0 {
            vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
        Event::Embedding { vector }
    }
}

/// A text whose tokens are being scored.
pub(super) struct Scoring {
    tokens: Vec<TokenId>,
    top: usize,
    scores: Vec<Option<SampledToken>>,
}

impl Scoring {
    pub fn new(request: &ScoreRequest) -> Self {
        let scores = vec![None; request.tokens.len()];
        Scoring { tokens: request.tokens.clone(), top: request.top, scores }
    }

    /// Takes the logits of the tokens from `position` on, `[tokens, vocab]`: each row is about the
    /// token after it.
    pub fn push(&mut self, position: usize, rows: &[f32], vocab: usize) {
        for (offset, logits) in rows.chunks_exact(vocab).enumerate() {
            let next = position + offset + 1;
            let Some(&token) = self.tokens.get(next) else { return };
            let log_z = log_sum_exp(logits);
            let of = |t: TokenId| logits[t as usize] - log_z;
            let top = top_tokens(logits, self.top).into_iter().map(|t| (t, of(t))).collect();
            self.scores[next] = Some(SampledToken { token, logprob: of(token), top });
        }
    }

    pub fn finish(&mut self) -> Event {
        Event::Scores { tokens: std::mem::take(&mut self.scores) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::{RequestId, TenantId};

    fn embedding(pooling: Pooling, chunks: &[&[f32]]) -> Vec<f32> {
        let request = EmbedRequest {
            request: RequestId(1),
            tenant: TenantId::local(),
            tokens: Vec::new(),
            pooling,
            priority: 0,
            deadline: None,
        };
        let mut embedding = Embedding::new(&request);
        let mut position = 0;
        for chunk in chunks {
            embedding.push(position, chunk, 2);
            position += chunk.len() / 2;
        }
        match embedding.finish() {
            Event::Embedding { vector } => vector,
            other => panic!("not a vector: {other:?}"),
        }
    }

    #[test]
    fn pooling_is_normalised_and_blind_to_chunks() {
        let whole: &[f32] = &[3.0, 4.0, 0.1, 0.2, 0.3, 0.4];
        for pooling in [Pooling::Mean, Pooling::Last] {
            let one = embedding(pooling, &[whole]);
            let cut = embedding(pooling, &[&whole[..2], &whole[2..]]);
            assert_eq!(one, cut);
            let norm: f32 = one.iter().map(|x| x * x).sum();
            assert!((norm - 1.0).abs() < 1e-6);
        }
        assert_eq!(embedding(Pooling::Last, &[&[1.0, 1.0, 3.0, 4.0]]), [0.6, 0.8]);
        assert_eq!(embedding(Pooling::Mean, &[&[0.0, 0.0]]), [0.0, 0.0]);
    }

    #[test]
    fn scores_are_about_the_next_token() {
        let request = ScoreRequest {
            request: RequestId(1),
            tenant: TenantId::local(),
            tokens: vec![0, 1, 0],
            top: 1,
            priority: 0,
            deadline: None,
        };
        let mut scoring = Scoring::new(&request);
        let even = 0.5f32.ln();
        scoring.push(0, &[7.0, 7.0], 2);
        scoring.push(1, &[0.0, 50.0, 1.0, 1.0], 2);
        let Event::Scores { tokens } = scoring.finish() else { panic!("not scores") };
        assert_eq!(tokens[0], None);
        let first = tokens[1].as_ref().expect("scored");
        assert!((first.logprob - even).abs() < 1e-6 && first.token == 1);
        let second = tokens[2].as_ref().expect("scored");
        assert!(second.logprob < -49.0 && second.top[0].0 == 1);
    }
}
