//! Which blocks the sidecar need not be asked for.

use std::collections::VecDeque;

use kvstore::{BlockHash, PresenceView};

/// What one sidecar shows of its store, and what of ours it may not have taken in yet.
#[derive(Debug, Default)]
pub(super) struct Stored {
    presence: Option<PresenceView>,
    /// Blocks whose commit was sent, by the message's number, until the sidecar has answered a later one: it takes in one
    /// message after the other. Each commit needs a reservation, which is answered, so that they are few.
    committed: VecDeque<(u64, Vec<BlockHash>)>,
}

impl Stored {
    /// Without a filter everything is asked for.
    pub(super) fn shown_by(presence: Option<PresenceView>) -> Self {
        Self {
            presence,
            committed: VecDeque::new(),
        }
    }

    /// The sidecar does not have the block.
    pub(super) fn lacks(&self, hash: &BlockHash) -> bool {
        self.presence.as_ref().is_some_and(|presence| {
            !presence.may_have(hash) && !self.committed.iter().any(|(_, some)| some.contains(hash))
        })
    }

    /// A commit of these blocks was sent.
    pub(super) fn committed(&mut self, sequence: u64, hashes: Vec<BlockHash>) {
        if self.presence.is_some() {
            self.committed.push_back((sequence, hashes));
        }
    }

    /// The sidecar has answered the message of this number.
    pub(super) fn answered(&mut self, sequence: u64) {
        while self
            .committed
            .pop_front_if(|(sent, _)| *sent < sequence)
            .is_some()
        {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: BlockHash = BlockHash([1; 32]);

    #[test]
    fn a_commit_on_its_way_counts_as_stored() {
        let presence = kvstore::Presence::create(8).expect("memory");
        let file = presence.file();
        let fd = file.fd().try_clone_to_owned().expect("a descriptor");
        let view = PresenceView::open(fd, file.bytes()).expect("a mapping");
        let mut stored = Stored::shown_by(Some(view));
        assert!(stored.lacks(&HERE));
        stored.committed(7, vec![HERE]);
        stored.answered(6);
        assert!(!stored.lacks(&HERE));
        assert!(stored.lacks(&BlockHash([2; 32])));
        stored.answered(8);
        assert!(stored.lacks(&HERE), "by now the filter knows better");
    }

    #[test]
    fn without_a_filter_everything_is_asked_for() {
        assert!(!Stored::default().lacks(&HERE));
    }
}
