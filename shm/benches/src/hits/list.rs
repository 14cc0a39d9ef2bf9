//! A doubly linked list in a vector. It holds objects in queue order, and any object can be removed.

use std::collections::HashMap;

use crate::hits::policy::charge;
use crate::hits::trace::Request;

/// Position of a node, valid while the node is in the list.
pub(crate) type Place = usize;

const NONE: Place = usize::MAX;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) object: u32,
    pub(crate) charge: u64,
    pub(crate) visited: bool,
    newer: Place,
    older: Place,
}

#[derive(Debug)]
pub(crate) struct List {
    nodes: Vec<Node>,
    free: Vec<Place>,
    places: HashMap<u32, Place>,
    newest: Place,
    oldest: Place,
    /// Sum of the charges.
    pub(crate) bytes: u64,
}

impl List {
    pub(crate) fn new() -> List {
        List { nodes: Vec::new(), free: Vec::new(), places: HashMap::new(), newest: NONE, oldest: NONE, bytes: 0 }
    }

    pub(crate) fn find(&self, object: u32) -> Option<Place> {
        self.places.get(&object).copied()
    }

    pub(crate) fn node(&mut self, place: Place) -> &mut Node {
        &mut self.nodes[place]
    }

    pub(crate) fn oldest(&self) -> Option<Place> {
        Some(self.oldest).filter(|&place| place != NONE)
    }

    /// Returns the next newer node.
    pub(crate) fn newer(&self, place: Place) -> Option<Place> {
        Some(self.nodes[place].newer).filter(|&place| place != NONE)
    }

    pub(crate) fn push(&mut self, request: Request) {
        let node =
            Node { object: request.object, charge: charge(request.size), visited: false, newer: NONE, older: NONE };
        self.bytes += node.charge;
        let place = match self.free.pop() {
            Some(place) => {
                self.nodes[place] = node;
                place
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        self.places.insert(request.object, place);
        self.link(place);
    }

    pub(crate) fn remove(&mut self, place: Place) {
        self.unlink(place);
        self.bytes -= self.nodes[place].charge;
        self.places.remove(&self.nodes[place].object);
        self.free.push(place);
    }

    /// Moves the node to the newest end.
    pub(crate) fn renew(&mut self, place: Place) {
        self.unlink(place);
        self.link(place);
    }

    fn link(&mut self, place: Place) {
        self.nodes[place].older = self.newest;
        self.nodes[place].newer = NONE;
        match self.newest {
            NONE => self.oldest = place,
            newest => self.nodes[newest].newer = place,
        }
        self.newest = place;
    }

    fn unlink(&mut self, place: Place) {
        let Node { newer, older, .. } = self.nodes[place];
        match older {
            NONE => self.oldest = newer,
            older => self.nodes[older].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.nodes[newer].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(list: &mut List) -> Vec<u32> {
        let mut found = Vec::new();
        let mut at = list.oldest();
        while let Some(place) = at {
            found.push(list.node(place).object);
            at = list.newer(place);
        }
        found
    }

    #[test]
    fn keeps_its_order() {
        let mut list = List::new();
        (0..5).for_each(|object| list.push(Request { object, size: 0 }));
        let place = |list: &List, object| list.find(object).unwrap();
        for object in [2, 0, 4] {
            let at = place(&list, object);
            list.remove(at);
        }
        assert_eq!((order(&mut list), list.find(2)), (vec![1, 3], None));
        list.push(Request { object: 7, size: 0 });
        let at = place(&list, 1);
        list.renew(at);
        assert_eq!(order(&mut list), [3, 7, 1]);
        assert_eq!(list.bytes, 3 * charge(0));
    }
}
