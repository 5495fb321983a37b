//! Which waiting sessions' chains a block is in: an index of hints, filed in pieces.
//!
//! A want brings a chain of any length, and a step does a bounded amount of work. So the index lags behind the table for
//! some steps, and whoever reads it checks each place against the session's chain.

use std::collections::{HashMap, VecDeque};

use kvstore::{BlockHash, DigestMap};
use smallvec::SmallVec;

/// Of a chain that is only held, one block in so many is filed, the last one: it tells how much two chains share.
pub(super) const SAMPLED: usize = 16;
/// Of what is still to be filed, a step does at least one part in so many: it cannot pile up.
const BACKLOG_PART: usize = 16;

/// Whose chain a block is in, and at which position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) session: u64,
    pub(super) position: usize,
}

#[derive(Debug, Default)]
pub(super) struct Places {
    index: DigestMap<SmallVec<[Place; 1]>>,
    /// Chains that have come; those that have gone are filed after them.
    coming: VecDeque<Unfiled>,
    going: VecDeque<Unfiled>,
    /// Blocks of both.
    unfiled: usize,
    /// How many chains of a session are coming.
    behind: HashMap<u64, usize>,
}

/// A chain as the index has it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Chain<'a> {
    pub(super) hashes: &'a [BlockHash],
    /// Every block, because it is fetched and spared; else one in [`SAMPLED`].
    pub(super) every_block: bool,
}

/// Blocks that were or are in a session's chain, at their positions, and of which the index is to be told.
#[derive(Debug)]
struct Unfiled {
    session: u64,
    blocks: Vec<(usize, BlockHash)>,
    filed: usize,
}

impl Chain<'_> {
    /// Whether the index is to say that a block is in this chain.
    pub(super) fn files(&self, hash: &BlockHash, position: usize) -> bool {
        self.hashes.get(position) == Some(hash) && self.takes(position)
    }

    fn takes(&self, position: usize) -> bool {
        self.every_block || position % SAMPLED == SAMPLED - 1
    }

    fn blocks_from(&self, start: usize) -> Vec<(usize, BlockHash)> {
        let blocks = self.hashes.iter().copied().enumerate().skip(start);
        blocks
            .filter(|(position, _)| self.takes(*position))
            .collect()
    }
}

impl Places {
    /// A session's chain is another one. A turn extends the chain of the one before: what both have stays filed.
    pub(super) fn replace(&mut self, session: u64, old: Chain<'_>, new: Chain<'_>) {
        let shared = if old.every_block == new.every_block {
            let both = old.hashes.iter().zip(new.hashes);
            both.take_while(|(old, new)| old == new).count()
        } else {
            0
        };
        let unfiled = |chain: Chain<'_>| Unfiled {
            session,
            blocks: chain.blocks_from(shared),
            filed: 0,
        };
        let (going, coming) = (unfiled(old), unfiled(new));
        self.unfiled += going.blocks.len() + coming.blocks.len();
        if !coming.blocks.is_empty() {
            *self.behind.entry(session).or_default() += 1;
            self.coming.push_back(coming);
        }
        if !going.blocks.is_empty() {
            self.going.push_back(going);
        }
    }

    /// Files `blocks` of what is outstanding, or a share of it if that is more. `belongs` tells whether the index is to
    /// say that a block is at that place.
    pub(super) fn file(&mut self, blocks: usize, belongs: impl Fn(&BlockHash, &Place) -> bool) {
        let mut left = blocks.max(self.unfiled / BACKLOG_PART);
        while left > 0
            && let Some((mut unfiled, comes)) = self.next_unfiled()
        {
            let rest = &unfiled.blocks[unfiled.filed..];
            let now = &rest[..rest.len().min(left)];
            for (position, hash) in now {
                let place = Place {
                    session: unfiled.session,
                    position: *position,
                };
                if belongs(hash, &place) {
                    self.enter(*hash, place);
                } else {
                    self.strike(hash, place);
                }
            }
            left -= now.len();
            self.unfiled -= now.len();
            unfiled.filed += now.len();
            if unfiled.filed < unfiled.blocks.len() {
                let queue = if comes {
                    &mut self.coming
                } else {
                    &mut self.going
                };
                queue.push_front(unfiled);
            } else if comes && let Some(chains) = self.behind.get_mut(&unfiled.session) {
                *chains -= 1;
                if *chains == 0 {
                    self.behind.remove(&unfiled.session);
                }
            }
        }
    }

    /// The next chain, and whether it comes.
    fn next_unfiled(&mut self) -> Option<(Unfiled, bool)> {
        let coming = self.coming.pop_front().map(|unfiled| (unfiled, true));
        coming.or_else(|| Some((self.going.pop_front()?, false)))
    }

    fn enter(&mut self, hash: BlockHash, place: Place) {
        let places = self.index.entry(hash).or_default();
        if !places.contains(&place) {
            places.push(place);
        }
    }

    fn strike(&mut self, hash: &BlockHash, place: Place) {
        if let Some(places) = self.index.get_mut(hash) {
            places.retain(|other| *other != place);
            if places.is_empty() {
                self.index.remove(hash);
            }
        }
    }

    /// Where a block is, or was.
    pub(super) fn of(&self, hash: &BlockHash) -> &[Place] {
        self.index.get(hash).map_or(&[], |places| places)
    }

    /// Whether nothing is outstanding.
    pub(super) fn is_filed(&self) -> bool {
        self.unfiled == 0
    }

    /// Whether the index does not know all of a session's chain yet.
    pub(super) fn is_behind(&self, session: u64) -> bool {
        self.behind.contains_key(&session)
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(first: u8, count: u8) -> Vec<BlockHash> {
        (first..first + count).map(|i| BlockHash([i; 32])).collect()
    }

    fn every_block(hashes: &[BlockHash]) -> Chain<'_> {
        Chain {
            hashes,
            every_block: true,
        }
    }

    fn sampled(hashes: &[BlockHash]) -> Chain<'_> {
        Chain {
            hashes,
            every_block: false,
        }
    }

    /// Files all that is outstanding, one block at a time, while these are the chains.
    fn file_all(places: &mut Places, chains: &[(u64, Chain<'_>)]) {
        while !places.is_filed() {
            places.file(1, |hash, place| {
                let chain = chains.iter().find(|(session, _)| *session == place.session);
                chain.is_some_and(|(_, chain)| chain.files(hash, place.position))
            });
        }
    }

    fn sessions(places: &Places, hash: &BlockHash) -> Vec<u64> {
        places.of(hash).iter().map(|place| place.session).collect()
    }

    #[test]
    fn a_chain_that_changed_before_it_was_filed_leaves_nothing_behind() {
        let (mut places, first, second) = (Places::default(), hashes(0, 4), hashes(10, 3));
        let (first, second) = (every_block(&first), every_block(&second));
        places.replace(1, Chain::default(), first);
        places.replace(1, first, second);
        places.replace(1, second, first);
        file_all(&mut places, &[(1, first)]);
        for (position, hash) in first.hashes.iter().enumerate() {
            let place = Place {
                session: 1,
                position,
            };
            assert_eq!(places.of(hash), [place]);
        }
        assert!(second.hashes.iter().all(|hash| places.of(hash).is_empty()));
        places.replace(1, first, Chain::default());
        file_all(&mut places, &[]);
        assert!(places.index.is_empty());
    }

    #[test]
    fn sessions_that_share_a_prefix_are_all_told() {
        let (mut places, shared) = (Places::default(), hashes(0, 3));
        let longer = [&shared[..], &hashes(20, 2)].concat();
        places.replace(1, Chain::default(), every_block(&shared));
        places.replace(2, Chain::default(), every_block(&longer));
        let chains = [(1, every_block(&shared)), (2, every_block(&longer))];
        file_all(&mut places, &chains);
        assert_eq!(sessions(&places, &shared[2]), [1, 2]);
        assert_eq!(sessions(&places, &longer[4]), [2]);
    }

    #[test]
    fn a_held_chain_is_sampled_until_it_is_to_be_brought_back() {
        let (mut places, chain) = (Places::default(), hashes(0, 40));
        let filed = |places: &Places| {
            let told = chain.iter().enumerate();
            let told = told.filter(|(_, hash)| !places.of(hash).is_empty());
            told.map(|(position, _)| position).collect::<Vec<_>>()
        };
        places.replace(1, Chain::default(), sampled(&chain));
        file_all(&mut places, &[(1, sampled(&chain))]);
        assert_eq!(filed(&places), [15, 31]);
        places.replace(1, sampled(&chain), every_block(&chain));
        file_all(&mut places, &[(1, every_block(&chain))]);
        assert_eq!(filed(&places).len(), 40);
        assert_eq!(sessions(&places, &chain[15]), [1], "told once");
        places.replace(1, every_block(&chain), sampled(&chain));
        file_all(&mut places, &[(1, sampled(&chain))]);
        assert_eq!(filed(&places), [15, 31]);
    }

    #[test]
    fn chains_that_come_are_filed_before_those_that_go() {
        let (mut places, old, new) = (Places::default(), hashes(0, 100), hashes(100, 5));
        places.replace(1, Chain::default(), every_block(&old));
        file_all(&mut places, &[(1, every_block(&old))]);
        places.replace(1, every_block(&old), Chain::default());
        places.replace(2, Chain::default(), every_block(&new));
        assert!(places.is_behind(2) && !places.is_behind(1));
        places.file(5, |_, place| place.session == 2);
        assert!(!places.is_behind(2) && !places.is_filed());
        assert_eq!(sessions(&places, &new[4]), [2]);
    }

    #[test]
    fn what_is_outstanding_cannot_pile_up() {
        let mut places = Places::default();
        for session in 0..1000 {
            places.replace(session, Chain::default(), every_block(&hashes(0, 100)));
        }
        let mut steps = 0;
        while !places.is_filed() {
            places.file(1, |_, _| false);
            steps += 1;
        }
        assert!(steps < 300, "{steps} steps for 100,000 blocks");
    }

    #[test]
    fn what_is_outstanding_stays_bounded_where_only_wants_come() {
        let (mut places, chain) = (Places::default(), hashes(0, 100));
        for _ in 0..1000 {
            places.replace(1, Chain::default(), every_block(&chain));
            places.file(0, |_, _| true);
            places.replace(1, every_block(&chain), Chain::default());
            places.file(0, |_, _| false);
        }
        assert!(
            places.unfiled <= 2 * BACKLOG_PART * 100,
            "{}",
            places.unfiled
        );
    }
}
