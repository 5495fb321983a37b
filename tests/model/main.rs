//! Model tests: random events from one printed seed, against a model that is obviously right.
//!
//! `GREENROOM_SEED=n` replays a run; `GREENROOM_EVENTS=n` changes its length.

#[cfg(test)]
mod events;
#[cfg(test)]
mod naive;
#[cfg(test)]
mod store;
