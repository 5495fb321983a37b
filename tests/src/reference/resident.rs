//! What answers must be: the same engine, without a sidecar and with a pool in which everything stays.

use std::collections::HashMap;
use std::path::PathBuf;

use sidecar::hooks::GpuPool;

use super::engine::{Answer, Engine, EngineOptions};

/// More than the tests of one engine ever fill.
const BLOCKS: u32 = 8192;

/// More than one turn takes from the pool.
const TURN_BLOCKS: usize = 256;

/// Engines that never evict, one for each seed of weights.
pub struct Resident {
    ranks: u32,
    engines: HashMap<u64, Engine>,
}

impl Resident {
    /// With as many ranks as the engine that is judged: sums over ranks round.
    pub fn new(ranks: u32) -> Self {
        Self {
            ranks,
            engines: HashMap::new(),
        }
    }

    /// # Panics
    /// If a logit of an answer has other bits than here.
    pub fn check(&mut self, answer: &Answer) {
        if let Some(difference) = self.difference(answer) {
            panic!("{} is answered wrongly: {difference}", answer.request);
        }
    }

    /// The first difference between an answer and this engine's.
    pub fn difference(&mut self, answer: &Answer) -> Option<String> {
        let mut at = 0;
        while let Some(first) = answer.samples.get(at) {
            let samples = answer.samples[at..].iter();
            let samples: Vec<_> = samples.take_while(|s| s.weights == first.weights).collect();
            let tokens = &answer.tokens[..answer.prompt + at];
            let engine = self.engine(first.weights);
            engine.add(None, tokens, samples.len());
            while engine.has_requests() {
                engine.advance();
            }
            let truth = engine.answers.pop().unwrap();
            let unused = engine.pool.free_list(TURN_BLOCKS);
            assert_eq!(
                unused.last(),
                Some(&None),
                "something may have been evicted"
            );
            for (i, (sample, truth)) in samples.iter().zip(&truth.samples).enumerate() {
                let pairs = sample.logits.iter().zip(&truth.logits);
                let wrong = |(a, b): (&f32, &f32)| (a.to_bits() != b.to_bits()).then_some((*a, *b));
                if let Some((token, (found, right))) = pairs
                    .enumerate()
                    .find_map(|(token, pair)| Some((token, wrong(pair)?)))
                {
                    return Some(format!(
                        "token {} of the answer has {found:e} instead of {right:e} for {token}; {} blocks were \
                         resident, {} loaded, of {} prompt tokens",
                        at + i,
                        answer.local,
                        answer.loaded,
                        answer.prompt,
                    ));
                }
            }
            at += samples.len();
        }
        None
    }

    fn engine(&mut self, weights: u64) -> &mut Engine {
        let ranks = self.ranks;
        self.engines.entry(weights).or_insert_with(|| {
            Engine::start(EngineOptions {
                name: format!("resident-{weights}"),
                socket: PathBuf::from("/nonexistent/greenroom.sock"),
                blocks: BLOCKS,
                ranks,
                weights,
            })
        })
    }
}
