//! The state of one stream between steps: sampler, text, stop strings, grammar.

use super::request::{Event, FinishReason, GenerateRequest, RequestError, Resumed};
use super::stop::{Scan, StopScanner};
use crate::grammar::{GrammarError, Matcher};
use crate::sampler::{SampledToken, Sampler, SamplerKey};
use crate::tokenizer::{Detokenizer, Tokenizer};
use protocol::TokenId;

pub(super) struct Generation {
    choice: usize,
    sampler: Sampler,
    detokenizer: Detokenizer,
    tokenizer: Tokenizer,
    stop: StopScanner,
    /// Away while its mask is being computed.
    pub matcher: Option<Matcher>,
    visible_specials: Vec<TokenId>,
    ignore_eos: bool,
    index: u64,
    ended: bool,
}

/// What one token did to a stream.
pub(super) struct Advance {
    pub token: TokenId,
    /// `None` for a token that ends generation: it is no part of the text.
    pub event: Option<Event>,
    pub finished: bool,
}

impl Generation {
    pub fn new(tokenizer: &Tokenizer, request: &GenerateRequest, choice: usize) -> Self {
        let key = match request.seed {
            Some(seed) => SamplerKey::from_seed(seed, choice),
            None => SamplerKey::from_request(request.request, choice),
        };
        Generation {
            choice,
            sampler: Sampler::new(request.sampling.clone(), key, &request.prompt),
            detokenizer: Detokenizer::continuing(tokenizer.clone(), true),
            tokenizer: tokenizer.clone(),
            stop: StopScanner::new(request.stop.clone()),
            matcher: request.grammar.as_ref().map(|grammar| grammar.matcher()),
            visible_specials: request.visible_specials.clone(),
            ignore_eos: request.ignore_eos,
            index: 0,
            ended: false,
        }
    }

    /// Draws the next token from `logits`, `[vocab]`.
    ///
    /// `mask` is the grammar's, if it was computed already.
    pub fn advance(
        &mut self,
        logits: &mut [f32],
        mask: Option<Vec<u32>>,
    ) -> Result<Advance, RequestError> {
        let index = self.index;
        let mask = match (mask, &mut self.matcher) {
            (None, Some(matcher)) => Some(matcher.mask().map_err(grammar_error)?.to_vec()),
            (mask, _) => mask,
        };
        let sampled = self
            .sampler
            .sample(logits, index, mask.as_deref())
            .ok_or(RequestError::NoToken { index })?;
        let token = sampled.token;
        if self.is_end(token) {
            self.index += 1;
            self.ended = true;
            return Ok(Advance { token, event: None, finished: true });
        }
        let event = self.accept(sampled)?;
        Ok(Advance { token, event: Some(event), finished: self.ended })
    }

    /// Goes through what was drawn before, without a model: afterwards everything is as it was where
    /// those tokens were drawn, and the events are the same. `tokens_max` is the most that the choice
    /// may have; a choice that is over now has its last event among them.
    pub fn replay(
        &mut self,
        before: &Resumed,
        tokens_max: usize,
    ) -> Result<Vec<Event>, RequestError> {
        let mut events = Vec::with_capacity(before.tokens.len());
        for sampled in &before.tokens {
            if self.ended || self.is_end(sampled.token) || events.len() >= tokens_max {
                let message = format!("choice {} ended before token {}", self.choice, self.index);
                return Err(RequestError::BadResume(message));
            }
            self.sampler.replay(sampled.token);
            events.push(self.accept(sampled.clone())?);
        }
        let full = events.len() >= tokens_max;
        let reason = match before.finished {
            None if self.ended => Some(FinishReason::Stop),
            None => full.then_some(FinishReason::Length),
            Some(reason) => {
                // Only the token that ends generation has no event.
                self.index += u64::from(reason == FinishReason::Stop && !self.ended);
                Some(reason)
            }
        };
        events.extend(reason.map(|reason| self.finish(reason)));
        Ok(events)
    }

    fn is_end(&self, token: TokenId) -> bool {
        !self.ignore_eos && self.tokenizer.is_end_of_generation(token)
    }

    /// Takes a drawn token into the text.
    fn accept(&mut self, sampled: SampledToken) -> Result<Event, RequestError> {
        let index = self.index;
        self.index += 1;
        if let Some(matcher) = &mut self.matcher {
            matcher.accept(sampled.token).map_err(grammar_error)?;
            self.ended = matcher.is_finished();
        }
        let text = self.text_of(sampled.token);
        let text = match self.stop.push(&text) {
            Scan::Emit(text) => text,
            Scan::Stopped(text) => {
                self.ended = true;
                text
            }
        };
        Ok(Event::Token { choice: self.choice, index, sampled, text })
    }

    pub fn finish(&mut self, reason: FinishReason) -> Event {
        let rest = self.detokenizer.finish();
        let text = match self.stop.push(&rest) {
            Scan::Emit(text) => text + &self.stop.finish(),
            Scan::Stopped(text) => text,
        };
        Event::Finished { choice: self.choice, reason, text, generated: self.index as usize }
    }

    fn text_of(&mut self, token: TokenId) -> String {
        if self.visible_specials.contains(&token) {
            let mut text = self.detokenizer.finish();
            text.push_str(&String::from_utf8_lossy(self.tokenizer.token_bytes(token)));
            return text;
        }
        self.detokenizer.push(token)
    }
}

fn grammar_error(error: GrammarError) -> RequestError {
    RequestError::Grammar(error.to_string())
}
